"""``svip train --processes`` and torchrun, as a user meets them: one result, one error, killed and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors

from svip.data.bundle import Bundle

pytestmark = pytest.mark.slow
EPOCHS = 3
OPTIONS = [*TINY, "train.select=false", "train.checkpoint_steps=2", "optim.lr=1e-4", "optim.head_lr=1e-4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("data") / "bundle", IMAGE_ROLES)


@pytest.fixture(scope="module")
def inputs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = tmp_path_factory.mktemp("words") / "words"
    write_vectors(words, bundle)
    return ["train", f"--bundle={bundle.path}", f"--vectors={words}", "--no-log-model"]


def start(arguments: list[str], *overrides: str, module: tuple[str, ...] = (), **environment: str) -> Any:
    command = [sys.executable, *module, "-m", "svip.cli", *arguments, *OPTIONS, *overrides]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def epochs(out: Path) -> list[int]:
    return [entry["epoch"] for entry in json.loads((out / "history.json").read_text())]


def workers(process: Any) -> list[int]:
    """The process numbers of the processes that train, by their rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                text = (folder / "environ").read_bytes().split(b"\0")
                ranks = [int(line[5:]) for line in text if line.startswith(b"RANK=")]
                found |= {rank: int(folder.name) for rank in ranks}
        except (OSError, ValueError, IndexError):
            continue  # not a process, or gone
    return [found[rank] for rank in sorted(found)]


def wait(process: Any, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None and reached(), process.communicate()


def test_two_processes_by_option_by_torchrun_and_one_alone_make_the_same_model(
    inputs: list[str], tmp_path: Path, store: str
) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    ways = {
        "alone": start([*inputs, f"--out={tmp_path / 'alone'}"]),
        "option": start([*inputs, f"--out={tmp_path / 'option'}", "--processes=2"]),
        "torchrun": start([*inputs, f"--out={tmp_path / 'torchrun'}"], module=torchrun),
    }
    results = {}
    for name, process in ways.items():
        output, log = process.communicate(timeout=180)
        assert process.returncode == 0, log
        assert output.count("trained: ") == 1
        run = MlflowClient(store).get_run((tmp_path / name / "run_id").read_text())
        assert run.info.status == "FINISHED" and run.info.run_id in output
        assert len(MlflowClient(store).get_metric_history(run.info.run_id, "final_train/loss")) == EPOCHS
        results[name] = load_file(tmp_path / name / "model.safetensors")
    for name, tensor in results["alone"].items():
        assert float((results["option"][name] - tensor).abs().max()) < 1e-4, name
        assert bool((results["option"][name] == results["torchrun"][name]).all()), name


@pytest.mark.parametrize("way", ["option", "torchrun"])
def test_an_error_is_shown_once(way: str, inputs: list[str], tmp_path: Path, store: str) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(
        [*inputs, f"--out={tmp_path / 'run'}", *(["--processes=2"] if way == "option" else [])],
        "optim.lr=1e30",
        "optim.head_lr=1e30",
        module=torchrun if way == "torchrun" else (),
    )
    output, log = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (output + log).count("Lower the learning rates") == 1
    if way == "option":
        assert "Traceback" not in log and "torch" not in log
    run = MlflowClient(store).get_run((tmp_path / "run" / "run_id").read_text())
    assert run.info.status in ("FAILED", "KILLED")


def test_a_killed_process_costs_only_the_steps_since_the_last_checkpoint(inputs: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start([*inputs, f"--out={out}", "--processes=2"], "optim.epochs=12")
    state = out / "final" / "state.pt"
    wait(process, lambda: state.exists() and len(workers(process)) == 2)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, log = process.communicate(timeout=180)
    assert process.returncode == 0, log
    assert log.count("process 2 of 2 was killed (has the memory run out?); going on from the last checkpoint") == 1
    assert "resumed after epoch" in log
    assert epochs(out) == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_stops_its_processes_keeps_its_state_and_goes_on(
    number: signal.Signals, inputs: list[str], tmp_path: Path, store: str
) -> None:
    out = tmp_path / "run"
    process = start([*inputs, f"--out={out}", "--processes=2"], "optim.epochs=12")
    wait(process, lambda: (out / "final" / "state.pt").exists())
    children = workers(process)
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    # A generator that the signal comes into as it is being closed says that it ignores the exception.
    assert process.returncode != 0 and "Traceback" not in re.sub("Exception ignored in: .*\nTraceback", "", log)
    assert log.count("stopped; the same command goes on in phase final after epoch ") == 1
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    client, run_id = MlflowClient(store), (out / "run_id").read_text()
    assert client.get_run(run_id).info.status == "KILLED"
    if number == signal.SIGINT:
        return  # what goes on is the same
    process = start([*inputs, f"--out={out}"], "optim.epochs=12")  # and by another number of processes
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed after epoch" in log, log
    assert epochs(out) == list(range(1, 13))
    assert client.get_run(run_id).info.status == "FINISHED"
