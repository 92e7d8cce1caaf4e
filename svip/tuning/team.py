"""A worker of several processes (torchrun's): rank 0 asks and tells, and the others train what it says.

They agree by broadcasts: before each trial on what it is, and after each of its epochs on whether it goes on. What one
process alone fails with ends them all, and another worker goes on with the trial.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svip.config import Config, load_config
from svip.data.bundle import Bundle
from svip.training import distributed
from svip.training.loop import NonFiniteLoss
from svip.tuning.objective import Report, select

SHARED = (NonFiniteLoss, ValueError)
"""What all processes of a trial raise at the same place, if one does; they go on together with the next one."""


@dataclass(frozen=True)
class Task:
    """What the processes do next: train with these overrides in that folder or, without a folder, look again."""

    overrides: Sequence[str] = ()
    folder: Path | None = None


class Ended(Exception):
    """Rank 0 has ended the trial."""


def processes() -> list[tuple[str, int]]:
    """Host and process id of all processes of this worker, which all have to ask."""
    return distributed.all_gather((socket.gethostname(), os.getpid()))


def one_is_gone(processes: Sequence[tuple[str, int]]) -> bool:
    """Whether one of those on this machine has ended."""
    return any(_has_ended(pid) for host, pid in processes if host == socket.gethostname())


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return True
    return False


def lead(
    config: Config, overrides: Sequence[str], bundle: Bundle, words: NDArray[np.float32], folder: Path, report: Report
) -> list[dict[str, Any]]:
    """``select`` in this process, and in the others that ``follow``; what ``report`` raises ends it in all."""

    def told(metrics: dict[str, float], epoch: int) -> None:
        try:
            report(metrics, epoch)
        except BaseException:
            distributed.broadcast(False)
            raise
        distributed.broadcast(True)

    distributed.broadcast(Task(overrides, folder))
    return select(config, bundle, words, folder, told)


def wait() -> None:
    """Have the others wait on; they would take silence for the end of this process."""
    distributed.broadcast(Task())


def dismiss() -> None:
    """Let the others end."""
    distributed.broadcast(None)


def follow(base: Path, bundle: Bundle, words: NDArray[np.float32]) -> None:
    """Do what rank 0 says, until it dismisses this process."""

    def told(metrics: dict[str, float], epoch: int) -> None:
        if not distributed.broadcast(True):
            raise Ended

    task: Task | None = Task()
    while (task := distributed.broadcast(task)) is not None:
        if task.folder is not None:
            try:
                select(load_config(str(base), task.overrides), bundle, words, task.folder, told)
            except (Ended, distributed.PeerFailed, *SHARED):
                pass  # rank 0 tells what became of it
