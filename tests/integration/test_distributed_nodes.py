"""Two network namespaces as two machines: one dies, and the other goes on alone from the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors

pytestmark = pytest.mark.slow
EPOCHS = 12


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces that see each other at 10.213.7.1 and 10.213.7.2."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2, to make network namespaces")
    names, cables = [f"svip{os.getpid()}{side}" for side in "ab"], [f"sv{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
    try:
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "link", "set", cable, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(node: str, number: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """torchrun in that namespace; the first node keeps the list of all."""
    command = ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"]
    command += ["--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=10.213.7.1:29400"]
    # both have the name of this machine, by which torchrun would know the first
    settings = f"last_call_timeout=10,is_host={'true' if number == 1 else 'false'}"
    command += ["--rdzv-id=svip", f"--rdzv-conf={settings}", f"--local-addr=10.213.7.{number}"]
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen(
            [*command, "-m", "svip.cli", *arguments],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )


def descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [process, *(found for child in children for found in descendants(int(child)))]


def progress(state: Path) -> tuple[int, int]:
    """How many processes there were, and how many epochs they had done, when this checkpoint was written."""
    content = torch.load(state, weights_only=True)
    return len(content["generators"]), content["progress"]["epoch"]


def test_a_node_that_dies_costs_seconds_and_no_epoch(nodes: list[str], tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", IMAGE_ROLES)
    write_vectors(tmp_path / "words", bundle)
    out = tmp_path / "run"
    arguments = ["train", f"--bundle={bundle.path}", f"--vectors={tmp_path / 'words'}", f"--out={out}", *TINY]
    arguments += ["--no-log-model", "train.select=false", "train.checkpoint_steps=1", f"optim.epochs={EPOCHS}"]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    agents = [start(node, i + 1, arguments, log) for i, (node, log) in enumerate(zip(nodes, logs, strict=True))]
    state = out / "final" / "state.pt"
    try:
        deadline = time.monotonic() + 180
        while not state.exists() or progress(state)[1] < 2:
            assert time.monotonic() < deadline and agents[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.05)
        first = set(descendants(agents[0].pid))
        for number in descendants(agents[1].pid):
            os.kill(number, signal.SIGKILL)
        died = time.time()
        time.sleep(0.2)  # what was being written is there
        before = progress(state)
        assert before[0] == 2 and before[1] < EPOCHS - 2, "killed too late to be a test"
        last = state.stat().st_mtime
        started = 0.0
        while state.exists() and state.stat().st_mtime == last:
            if not started and set(descendants(agents[0].pid)) - first:
                started = time.time() - died
            assert time.monotonic() < deadline + 180 and agents[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.02)
        lost = time.time() - died
        print(f"time lost: {lost:.1f} s; {started:.1f} s until the process was started again")
        assert agents[0].wait(timeout=180) == 0, logs[0].read_text()[-3000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                for number in reversed(descendants(agent.pid)):
                    os.kill(number, signal.SIGKILL)
            agent.wait()
    assert lost < 120
    history = json.loads((out / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == list(range(1, EPOCHS + 1))
    assert "final: resumed after epoch" in logs[0].read_text()
