"""Start the processes of a training on this machine, with torchrun's own agent, and say once what went wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from svip.config import ConfigError
from svip.training.distributed import WORKER, PeerFailed

log = logging.getLogger(__name__)

RESTARTS = 3
"""How often processes are started anew, from the last checkpoint, after one of them was killed."""


class WorkerFailed(RuntimeError):
    """What a process of the training has failed with."""


def asked(variable: str, value: int = 0) -> int:
    """``value`` or, where it is 0, that of an environment variable; 0 without one. ConfigError for no number."""
    text = str(value or os.environ.get(variable) or 0)
    if not text.isdecimal():
        raise ConfigError(f"{variable}={text}: expected a whole number from 1 on")
    return int(text)


def processes_for(device: str, value: int = 0) -> int:
    """How many processes train on this machine: ``value``, else SVIP_PROCESSES, else one for each GPU, at least one."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return asked("SVIP_PROCESSES", value) or max(gpus, 1)


def launch(arguments: Sequence[str], processes: int, environment: Mapping[str, str]) -> None:
    """Run ``svip`` with these arguments in so many processes that train together, and wait for them.

    ``environment``: what is another in theirs. SIGTERM and SIGINT are passed on, and then end this one too.
    WorkerFailed says which process failed, and with what.
    """
    for attempt in range(RESTARTS + 1):
        failure = _run(arguments, processes, environment)
        if failure is None:
            return
        rank, cause = failure
        killed = cause.exitcode == -signal.SIGKILL
        if not killed or attempt == RESTARTS:
            raise WorkerFailed(_described(rank, cause, processes))
        log.warning("%s; going on from the last checkpoint", _described(rank, cause, processes))


def _run(arguments: Sequence[str], processes: int, environment: Mapping[str, str]) -> tuple[int, ProcessFailure] | None:
    """The rank and failure of the process that the others failed with; None when all did what they should."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    own = {WORKER: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with tempfile.TemporaryDirectory(prefix="svip-") as folder, _environment({**own, **environment}), _signals_kept():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,  # those of the agent would repeat a faulty configuration too
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        _quieten()
        try:
            elastic_launch(config, sys.executable)("-m", "svip.cli", *arguments)
        except ChildFailedError as error:
            return _root_cause(error.failures)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)
    return None


def _root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """What the agent found first may be a process that merely lost the connection to the one that failed."""

    def order(failure: ProcessFailure) -> int:
        said = os.path.basename(failure.error_file) == "error.json"
        return 0 if failure.exitcode == -signal.SIGKILL else 1 if said else 2

    rank = min(failures, key=lambda rank: order(failures[rank]))
    return rank, failures[rank]


def _described(rank: int, failure: ProcessFailure, processes: int) -> str:
    who = f"process {rank + 1} of {processes}"
    if failure.exitcode == -signal.SIGKILL:
        return f"{who} was killed (has the memory run out?)"
    if failure.exitcode < 0:
        return f"{who} was ended by {failure.signal_name()}"
    message = failure.error_file_data["message"]
    if isinstance(message, dict):  # TypeName: text
        return str(message["message"]).partition(": ")[2]
    return f"{who} ended with exit code {failure.exitcode}; what it said stands above"


def left_to_others(error: BaseException) -> bool:
    """Whether the error of this process is shown by another one: the one that failed first, or that started it."""
    if isinstance(error, PeerFailed):
        return True
    if WORKER in os.environ:
        ErrorHandler().record_exception(error)
        return True
    return False


def _quieten() -> None:
    """The agent reports to its own loggers, each with a level of its own, what is said better here."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("torch.distributed") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The agent puts its own handlers in place and leaves them there."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
