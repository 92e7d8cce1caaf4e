"""Workers on this machine: start them, show what they finish, and stop them together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from svip.tuning.space import shown
from svip.tuning.storage import STORAGE, TuningError
from svip.tuning.study import ENDED_WELL, Study

GRACE = 60.0
"""Seconds that stopped workers have to tell so."""
LAST_LINES = 5


def run_workers(study: Study, arguments: Sequence[str], workers: int, address: str, logs: Path) -> None:
    """Run ``svip tune --worker`` in so many processes until the study is finished, with a line for each ended trial.

    The storage's ``address`` goes by the environment, as it may hold a password. Raises TuningError where the workers
    end before the study does, and KeyboardInterrupt after all were stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "svip.cli", "tune", "--worker", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    files: list[Path] = []
    told = {trial.number for trial in study.all_trials() if trial.state.is_finished()}
    try:
        host = socket.gethostname()  # several machines may share the folder
        with _signals_interrupt(), tqdm(total=study.trials, desc="trials", unit="trial") as bar:
            for number in range(workers):
                environment = {**os.environ, **share_of(number, workers), STORAGE: address}
                files.append(logs / f"{host}-{number}.log")
                with files[-1].open("ab") as file:
                    # a session of its own: Ctrl-C reaches this process alone, which then stops them all
                    processes.append(
                        subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
                    )
            while True:
                running = [process for process in processes if process.poll() is None]
                show_new(study, told, bar)
                if not running or study.is_finished():  # a worker may still be starting
                    break
                time.sleep(1)
    finally:
        _stop(processes)
    if not study.is_finished():
        number = max(range(workers), key=lambda index: processes[index].returncode == 1)
        tail = files[number].read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise TuningError(
            "the workers ended before the study did; the same command goes on. The end of "
            f"{files[number]}:\n" + "\n".join(f"   {line}" for line in tail)
        )


def share_of(number: int, workers: int) -> Mapping[str, str]:
    """Environment of one of several workers: its share of the processors and of the GPUs."""
    environment = {"TQDM_MININTERVAL": "10", "PYTHONUNBUFFERED": "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    gpus = torch.cuda.device_count()
    if gpus > 1 and workers > 1:
        visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number::workers]) or visible[number % gpus]
    return environment


def show_new(study: Study, told: set[int], bar: tqdm[object]) -> None:
    """Write a line for each trial that has ended since, and move the bar; ``told`` are their numbers."""
    trials = study.all_trials()
    for trial in sorted(trials, key=lambda trial: trial.datetime_complete or datetime.max):
        if trial.state.is_finished() and trial.number not in told and "discarded" not in trial.user_attrs:
            told.add(trial.number)
            bar.write(describe(trial, trials), file=sys.stderr)
    ended = sum(trial.state in ENDED_WELL for trial in trials)
    if ended != bar.n:
        bar.update(ended - bar.n)


def describe(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> str:
    """One line about an ended trial."""
    name = f"trial {trial.number:3d}"
    if trial.state is TrialState.COMPLETE:
        best = max(
            (other for other in trials if other.state is TrialState.COMPLETE), key=lambda other: other.value or 0
        )
        mark = "  <- best" if best.number == trial.number else ""
        return f"{name}: H {trial.value:5.1f}  {shown(trial.params)}{mark}"
    if trial.state is TrialState.PRUNED:
        return f"{name}: pruned after epoch {trial.last_step}, H {trial.value:.1f}  {shown(trial.params)}"
    if "error" in trial.user_attrs:
        return f"{name}: failed: {trial.user_attrs['error']}  {shown(trial.params)}"
    return f"{name}: {'stopped' if 'stopped' in trial.user_attrs else 'its worker died'}; another goes on with it"


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within it SIGTERM, and the SIGHUP of a terminal that is closed, are as Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
