"""How many processes are started, and which of their failures is the one that is told."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from svip.config import ConfigError
from svip.training import launch


def failed(rank: int, exitcode: int, folder: Path, message: str = "") -> ProcessFailure:
    file = folder / str(rank) / "error.json"
    file.parent.mkdir()
    if message:
        said = {"message": message, "extraInfo": {"timestamp": "1", "py_callstack": ""}}
        file.write_text(json.dumps({"message": said}))
    return ProcessFailure(rank, 1000 + rank, exitcode, str(file))


def test_processes_are_those_asked_for_else_of_the_environment_else_one_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVIP_PROCESSES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.processes_for("auto") == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = {device: launch.processes_for(device) for device in ("auto", "cuda", "cuda:1", "cpu")}
    assert found == {"auto": 4, "cuda": 4, "cuda:1": 1, "cpu": 1}
    monkeypatch.setenv("SVIP_PROCESSES", "2")
    assert launch.processes_for("auto") == launch.processes_for("cpu") == 2
    assert launch.processes_for("auto", 3) == 3
    for wrong in ("two", "-1", "1.5"):
        monkeypatch.setenv("SVIP_PROCESSES", wrong)
        with pytest.raises(ConfigError, match=f"SVIP_PROCESSES={wrong}: expected a whole number"):
            launch.processes_for("auto")


def test_the_failure_that_is_told_is_that_of_the_process_which_had_it(tmp_path: Path) -> None:
    lost, said = failed(0, 1, tmp_path), failed(1, 1, tmp_path, "ValueError: data.root: no such folder: x")
    rank, cause = launch._root_cause({0: lost, 1: said})
    assert rank == 1 and launch._described(rank, cause, 2) == "data.root: no such folder: x"
    killed = failed(2, -signal.SIGKILL, tmp_path)
    rank, cause = launch._root_cause({0: lost, 1: said, 2: killed})
    assert launch._described(rank, cause, 3) == "process 3 of 3 was killed (has the memory run out?)"
    assert launch._described(0, lost, 2) == "process 1 of 2 ended with exit code 1; what it said stands above"
    crashed = failed(3, -signal.SIGSEGV, tmp_path)
    assert launch._described(3, crashed, 4) == "process 4 of 4 was ended by SIGSEGV"
