"""The tests' own Docker engine: gigabytes in a temporary folder, and nobody who would look for them later."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import docker_engine

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(
        shutil.which("dockerd") is None or os.getuid() != 0, reason="needs dockerd, and root who starts it"
    ),
]
USE = """
import sys
import pytest
from benchmarks.docker_engine import own_engine

try:
    with own_engine() as host:
        print(host, flush=True)
        sys.stdin.read()
except pytest.skip.Exception as reason:
    print(reason)
"""


def test_it_ends_and_leaves_nothing_when_who_started_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", USE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout
        said = user.stdout.readline().decode().strip()
        if said.startswith("needs "):
            pytest.skip(said)
        folder = Path(said.removeprefix("unix://")).parent
        assert folder.name.startswith("svip-engine-"), said
        daemon = Path("/proc") / (folder / "pid").read_text()
        assert daemon.exists()
        user.kill()
    deadline = time.monotonic() + 120
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists() and not daemon.exists()
    assert str(folder) not in Path("/proc/mounts").read_text()


def test_one_that_does_not_end_is_killed_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine, "PATIENCE", 1)
    with docker_engine.own_engine() as host:
        folder = Path(host.removeprefix("unix://")).parent
        os.kill(int((folder / "pid").read_text()), signal.SIGSTOP)
    assert not folder.exists() and str(folder) not in Path("/proc/mounts").read_text()
