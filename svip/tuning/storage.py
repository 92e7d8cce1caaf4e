"""Where a study is kept, and how a dead worker's trial is told from a slow one's."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from svip.tracking import without_password

log = logging.getLogger(__name__)

STORAGE = "SVIP_TUNING_STORAGE"
"""The variable that holds the storage's address where a command is given none."""
BEATS = 4
"""A trial is dead after so many heartbeats that did not come."""


class TuningError(RuntimeError):
    """A study that can't go on; the message says why and what to do."""


class Liveness(Protocol):
    """Which running trials still have a worker."""

    def hold(self, trial: FrozenTrial) -> contextlib.AbstractContextManager[bool]:
        """Show that this process works at the trial; False where another one does."""

    def fail_dead(self, study: optuna.Study, failed: Callable[[FrozenTrial], None]) -> None:
        """Fail the running trials whose worker is gone; ``failed`` is called for each, in one process only."""


class Locks:
    """On one machine: a locked file a trial, which the operating system unlocks the moment its process ends."""

    def __init__(self, storage: BaseStorage, folder: Path) -> None:
        self._storage, self._folder = storage, folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def hold(self, trial: FrozenTrial) -> Iterator[bool]:
        lock = FileLock(self._folder / f"{trial.number:04d}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def fail_dead(self, study: optuna.Study, failed: Callable[[FrozenTrial], None]) -> None:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with self.hold(trial) as free:
                if free and _is_running(self._storage, trial):  # its worker would hold it until it is told
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    failed(self._storage.get_trial(trial._trial_id))


class Heartbeats:
    """With a database: a running trial writes the time every so often."""

    def __init__(self, storage: RDBStorage, interval: float) -> None:
        self._storage, self._interval = storage, interval

    @contextlib.contextmanager
    def hold(self, trial: FrozenTrial) -> Iterator[bool]:
        # the first beat comes before the trial runs: Optuna takes one without any for alive
        self._storage.record_heartbeat(trial._trial_id)
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(trial._trial_id, ended), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            ended.set()
            thread.join()

    def _beat(self, trial_id: int, ended: threading.Event) -> None:
        while not ended.wait(self._interval):
            try:
                self._storage.record_heartbeat(trial_id)
            except OptunaError as error:  # a server that is away for a moment
                log.warning("no heartbeat could be written: %s", without_password(str(error)))

    def fail_dead(self, study: optuna.Study, failed: Callable[[FrozenTrial], None]) -> None:
        self._storage.heartbeat_stale_trial_callback = lambda _, trial: failed(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)


def _is_running(storage: BaseStorage, trial: FrozenTrial) -> bool:
    return storage.get_trial(trial._trial_id).state is TrialState.RUNNING


def set_running(storage: BaseStorage, trial: FrozenTrial) -> bool:
    """Take a waiting trial; False where another worker was faster."""
    try:
        return storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False


def storage_address(given: str, out: Path) -> str:
    """``given``, else SVIP_TUNING_STORAGE, else the journal file of the study's folder."""
    return given or os.environ.get(STORAGE, "") or str(out / "study.journal")


def open_storage(address: str, out: Path, heartbeat: int) -> tuple[BaseStorage, Liveness]:
    """The storage at a database's address, or in a journal file. TuningError, without a password, where it fails."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if "://" not in address:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        journal = JournalStorage(JournalFileBackend(address))
        return journal, Locks(journal, out / "locks")
    # SQLAlchemy's own choice of a driver has changed between its versions; this one comes with svip[cluster]
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            database = RDBStorage(
                url,
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=BEATS * heartbeat,
            )
    except Exception as error:  # SQLAlchemy's, the driver's and the import system's
        said = without_password(str(error).strip().splitlines()[0])
        raise TuningError(
            f"the study's storage {without_password(address)} can't be used; check --storage or {STORAGE}, and that "
            f"the server runs. It says: {said}"
        ) from None  # whose traceback would show the password
    return database, Heartbeats(database, heartbeat)
