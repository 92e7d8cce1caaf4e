"""The tests' own Docker engine: gigabytes in a temporary folder, and nobody who would look for them later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker
USE = """
import sys
from benchmarks.docker_engine import own_engine

with own_engine() as host:
    print(host, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(shutil.which("dockerd") is None or os.getuid() != 0, reason="needs dockerd, and root who starts it")
def test_it_ends_and_leaves_nothing_when_who_started_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", USE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout
        folder = Path(user.stdout.readline().decode().strip().removeprefix("unix://")).parent
        assert folder.name.startswith("svip-engine-"), "no engine can be started here"
        daemon = Path("/proc") / (folder / "pid").read_text()
        assert daemon.exists()
        user.kill()
    deadline = time.monotonic() + 120
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists() and not daemon.exists()
    assert str(folder) not in Path("/proc/mounts").read_text()
