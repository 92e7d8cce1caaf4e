"""A real PostgreSQL server for tests and benchmarks: the one that is installed (Debian's package postgresql)."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.ports import free_port
from benchmarks.s3server import MORTAL

USER = "tester"
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB")
"""Nobody needs this server's data after a crash."""


def find_postgres() -> Path | None:
    """The folder of the newest server's programs: Debian keeps them off PATH."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(versions, key=lambda program: int(program.parts[-3]), default=None)
    found = str(newest) if newest else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a server of its own on a free loopback port; the URL of its database ``postgres``, password included.

    Its data lie in a temporary folder, and it runs as another user where this one is root, whom it refuses.
    RuntimeError when it does not start.
    """
    programs = find_postgres()
    if programs is None:
        raise RuntimeError("no PostgreSQL server: apt-get install postgresql")
    password, port, owner = secrets.token_hex(16), free_port(), _owner()
    with tempfile.TemporaryDirectory(prefix="svip-postgres-") as name:
        folder = Path(name)
        (folder / "password").write_text(password)
        if owner:
            for path in (folder, folder / "password"):
                shutil.chown(path, owner)
        make = [str(programs / "initdb"), f"--pgdata={folder / 'data'}", f"--username={USER}", "--auth=scram-sha-256"]
        make += [f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        made = subprocess.run(make, user=owner, cwd=folder, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr[-2000:]}")
        run = [*MORTAL, str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port)]
        run += ["-k", "", *(word for setting in FAST for word in ("-c", setting))]
        with open(folder / "log.txt", "w") as log:
            process = subprocess.Popen(run, user=owner, cwd=folder, stdout=log, stderr=log)
        url = f"postgresql://{USER}:{password}@127.0.0.1:{port}/postgres"
        try:
            _wait(process, url, folder / "log.txt")
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # its word for: disconnect everybody and stop
            process.wait(60)


def new_database(url: str, name: str) -> str:
    """Create an empty database on the server of ``url``, in place of an older one of that name; its URL."""
    import psycopg2

    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        cursor.execute(f'CREATE DATABASE "{name}"')
    return url.rpartition("/")[0] + f"/{name}"


def _owner() -> str | None:
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            psycopg2.connect(url).close()
            return
        except psycopg2.OperationalError:
            time.sleep(0.05)
    raise RuntimeError(f"the PostgreSQL server did not start:\n{log.read_text()[-2000:]}")
