"""A Docker engine and the project's image for the tests: what is there is used, the rest is made and removed again."""

from __future__ import annotations

import configparser
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from benchmarks.ports import free_port

ROOT = Path(__file__).parents[1]
SOCKET = "unix:///var/run/docker.sock"
STANDS_IN = "svip-test-python:3.11"
"""A base image made of Debian's own packages, for machines that reach no image registry."""


def answers(host: str) -> bool:
    """Whether an engine answers there."""
    try:
        with contextlib.closing(docker.DockerClient(host, timeout=5)) as client:
            return bool(client.ping())
    except (DockerException, OSError):
        return False


@contextlib.contextmanager
def running_engine() -> Iterator[str]:
    """The address of this machine's engine, else of one of our own; skips where neither can be had."""
    host = os.environ.get("DOCKER_HOST") or SOCKET
    if answers(host):
        yield host
        return
    if shutil.which("dockerd") is None or os.getuid() != 0:
        pytest.skip(f"needs a Docker engine: none answers at {host}, and only root can start one (Debian: docker.io)")
    with own_engine() as host:
        yield host


REMOVE = r"""
grep -o " $folder/[^ ]*" /proc/mounts | sort -r | xargs -r umount --lazy
rm -rf "$folder"
"""
"""Shell: remove the folder of an engine that has ended (dockerd leaves the mount of its network namespace)."""
SUPERVISED = rf"""
trap 'kill $!' TERM
"$@" &
wait $!  # until SIGTERM comes
wait $!
{REMOVE}"""
"""Shell: run a server and, when it has ended, remove its folder."""
PATIENCE = 120
"""Seconds that an engine may take to end by itself."""


@contextlib.contextmanager
def own_engine() -> Iterator[str]:
    """dockerd with everything of its own in a temporary folder, which is removed with all images at the end.

    It ends with this process, however that ends. It sets no rules of a firewall and forwards nothing: a container has
    the network of this machine, or none.
    """
    folder = tempfile.mkdtemp(prefix="svip-engine-")  # short: a socket's path may have 107 characters
    host = f"unix://{folder}/docker.sock"
    alone = ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"]
    own = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    dockerd = ["dockerd", f"--host={host}", "--exec-opt=native.cgroupdriver=cgroupfs", *own, *alone]
    command = ["setpriv", "--pdeathsig=TERM", "sh", "-c", SUPERVISED, "sh", *dockerd]
    env = {**os.environ, "folder": folder}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            for _ in range(300):
                if process.poll() is not None or answers(host):
                    break
                time.sleep(0.2)
            if not answers(host):
                log.seek(0)
                pytest.skip(f"needs a Docker engine: dockerd can't run here: {log.read().decode().splitlines()[-1:]}")
            yield host
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:  # the shell, which would remove the folder, is killed with its server
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                subprocess.run(["sh", "-c", REMOVE], env=env, check=True)


@contextlib.contextmanager
def built_image(host: str, folder: Path) -> Iterator[str]:
    """The tag of the cpu image, built by ``make image``.

    Root on Debian with Python 3.11 builds on a base image of its own, from wheels that this machine's pip gets: no
    registry and no index is asked from within. Else the build fetches what it needs by itself.
    """
    tag = "svip-test:cpu"
    context = folder / "context"
    copy_context(context)
    settings, made_too = [f"IMAGE={tag}", "GIT_SHA=0123abc"], []
    if os.getuid() == 0 and shutil.which("debootstrap") and is_like_the_base():
        make_base(host, folder / "base")
        made_too.append(STANDS_IN)
        make_wheels(folder / "wheels")
        arguments = f"--build-arg PYTHON_IMAGE={STANDS_IN} --build-arg PIP_NO_INDEX=1"
        settings += [f"WHEELS={folder / 'wheels'}", f"WHEELS_PORT={free_port()}", f"BUILD_ARGS={arguments}"]
    command = ["make", "image", f"PYTHON={sys.executable}", *settings]
    done = subprocess.run(command, cwd=context, env=environment(host), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    for name in ("base", "wheels"):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        yield tag
    finally:
        with contextlib.closing(docker.DockerClient(host, timeout=600)) as client:
            for made in [tag, *made_too]:  # of an engine that is not ours nothing else
                client.images.remove(made, force=True)


def environment(host: str) -> dict[str, str]:
    return {**os.environ, "DOCKER_HOST": host}


def is_like_the_base() -> bool:
    """Whether this Python's wheels fit Debian 12's."""
    return sys.version_info[:2] == (3, 11) and (sys.platform, platform.machine()) == ("linux", "x86_64")


def copy_context(context: Path) -> None:
    """What a checkout holds and the image is made of."""
    context.mkdir()
    for name in ("svip", "components", "pipelines", "infra/docker"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dockerignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, context)
    shutil.copy(ROOT / "infra/server.sh", context / "infra")


def make_base(host: str, root: Path) -> None:
    """Debian 12 with its own Python, which is 3.11 too, as an image."""
    packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
    mirror = next((line.split()[1] for line in apt_sources() if line.startswith("URIs:")), "")
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root), *([mirror] if mirror else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    left_out = [f"--exclude=./{path}" for path in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc")]
    with subprocess.Popen(["tar", "-C", str(root), *left_out, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "import", "-c", 'CMD ["python3"]', "-", STANDS_IN],
            stdin=tar.stdout,
            env=environment(host),
            capture_output=True,
            check=True,
        )
    assert tar.returncode == 0


def apt_sources() -> list[str]:
    """Lines of the list of Debian's mirrors that this machine uses."""
    file = Path("/etc/apt/sources.list.d/debian.sources")
    return file.read_text().splitlines() if file.exists() else []


def make_wheels(folder: Path) -> None:
    """Wheels of all that the image needs, by pip as it is set up here."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    folder.mkdir()
    (folder / "requirements.txt").write_text(
        f"{settings['options']['install_requires']}\n{settings['options.extras_require']['cluster']}\nsetuptools\n"
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder), "--no-cache-dir"]
    command += ["--constraint", "constraints.txt", "--requirement", str(folder / "requirements.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
