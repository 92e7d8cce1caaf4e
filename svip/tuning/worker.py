"""A worker: takes trials of a study, trains each, and tells what became of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.exceptions import OptunaError, TrialPruned
from optuna.trial import FrozenTrial, TrialState

from svip import tracking
from svip.config import flatten, load_config
from svip.data.bundle import Bundle
from svip.training import distributed
from svip.tuning.objective import OBJECTIVE, best_of, epochs_of, finish_folder
from svip.tuning.space import Space, assignments, shown, suggest
from svip.tuning.storage import TuningError
from svip.tuning.study import DEATHS, Study
from svip.tuning.team import SHARED, dismiss, follow, lead, one_is_gone, processes, wait

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at the study of a worker that has nothing to do."""


class Stopped(SystemExit):
    """This worker was told to end (SIGTERM, Ctrl-C)."""


class PeerDied(Stopped):
    """Another process of this worker has died, by which this one can't go on."""


class DiedTooOften(TuningError):
    """A trial that DEATHS workers have died of, and that nobody begins again."""


class TakenOver(RuntimeError):
    """Another worker goes on with this trial: this one was silent for too long."""


class Stop:
    """Turns the first SIGTERM or SIGINT into ``Stopped``: at once in a ``with stop.possible()``, else at its start.

    So nothing is stopped halfway through telling the storage.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._possible = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: object) -> None:
        first, self.signal = not self.signal, self.signal or number
        if first and self._possible:
            raise Stopped(128 + number)

    @contextlib.contextmanager
    def possible(self, yes: bool = True) -> Iterator[None]:
        """Within it a signal stops at once (``yes``), or only later."""
        before, self._possible = self._possible, yes
        try:
            if yes and self.signal:
                raise Stopped(128 + self.signal)
            yield
        finally:
            self._possible = before
        if before and self.signal:
            raise Stopped(128 + self.signal)


@dataclass
class Worker:
    """What one process needs to work at a study."""

    study: Study
    space: Space
    preset: str
    base: Path
    """The configuration that trials vary, as a YAML file."""
    bundle: Bundle
    words: NDArray[np.float32]
    trials: Path
    """Folder of the trials' folders, shared by all workers that are to resume each other's trials."""
    experiment: str
    max_errors: int = 10
    """After so many trials with errors the study stops."""
    _processes: list[tuple[str, int]] = field(default_factory=list)

    def work(self) -> int:
        """Take trials until the study is finished; how many ended well here.

        Raises TuningError after too many trials with errors, and Stopped, with everything told, on SIGTERM or SIGINT.
        """
        with Stop() as stop:  # in the other processes too: they end when rank 0 has
            self._processes = processes()
            if not distributed.is_main():
                follow(self.base, self.bundle, self.words)
                return 0
            with tracking.runs_of_their_own():
                ended = self._lead(stop)
            dismiss()
            return ended

    def _lead(self, stop: Stop) -> int:
        ended = 0
        while True:
            self.study.tidy(self._died)
            if self.study.is_finished():
                return ended
            errors = self.study.errors()
            if len(errors) >= self.max_errors:
                dismiss()
                last = errors[-1]
                raise TuningError(
                    f"{len(errors)} trials failed, the last one (trial {last.number}, "
                    f"{shown(last.params)}) with: {last.user_attrs['error']}. Narrow the search space, or raise "
                    "--max-errors and run the same command again"
                )
            with stop.possible():
                pass
            trial = self.study.take()
            if trial is None:
                wait()
                with stop.possible():
                    time.sleep(POLL)
                continue
            with self.study.liveness.hold(trial) as mine:
                if mine and self.study.begin(trial):
                    ended += self._run(trial, stop)

    def _run(self, frozen: FrozenTrial, stop: Stop) -> bool:
        """Train a trial that is this worker's; whether it ended well. It is told to the storage in any case."""
        study = self.study.load(seed=frozen.number)
        study.get_trials(deepcopy=False)  # Optuna's cache of a database wants to have seen a trial that it writes to
        trial = optuna.trial.Trial(study, frozen._trial_id)
        try:
            history, state = self._train(trial, stop)
        except TakenOver as error:
            log.warning("trial %d: %s", trial.number, error)
            return False
        except PeerDied as error:
            self.study.fail(frozen, died=True)
            raise distributed.PeerFailed(f"trial {trial.number}: {error}") from error
        except (Stopped, tracking.TrackingError, OptunaError) as error:  # nothing that the trial can help
            self.study.fail(frozen)
            log.info("trial %d: stopped (%s); it will be gone on with", trial.number, type(error).__name__)
            raise
        except Exception as error:
            self.study.fail(frozen, f"{type(error).__name__}: {error}")
            finish_folder(self._folder(trial.number), [])
            log.warning("trial %d failed: %s: %s", trial.number, type(error).__name__, error)
            log.debug("this was it:", exc_info=True)
            if distributed.world() > 1 and not isinstance(error, (*SHARED, DiedTooOften)):
                raise  # the other processes may be elsewhere
            return False
        value = best_of(history)[OBJECTIVE] if state is TrialState.COMPLETE else None
        study.tell(trial, value, state, skip_if_finished=True)
        finish_folder(self._folder(trial.number), history)
        log.info("trial %d: %s, H %.2f", trial.number, state.name.lower(), best_of(history)[OBJECTIVE])
        return True

    def _train(self, trial: optuna.trial.Trial, stop: Stop) -> tuple[list[dict[str, Any]], TrialState]:
        """The epochs of a trial, and whether it was pruned; all of it is in its MLflow run, which is ended."""
        folder = self._take_over(trial)
        values = suggest(self.space, trial)
        config = load_config(str(self.base), assignments(values))
        known = self._inherit(trial)
        record = folder / "run_id"
        tags = {"preset": self.preset, "bundle_sha256": self.bundle.sha256, "step": "trial"}
        tags |= {"trial.number": str(trial.number), "study": self.study.name, "trial.state": "running"}
        if "resumes" in trial.user_attrs:
            tags["trial.resumes"] = str(trial.user_attrs["resumes"])
        with contextlib.ExitStack() as stack:
            tracker = tracking.open_tracker(
                self.experiment,
                f"trial-{trial.number:03d} {shown(values)}",
                parent_run_id=self.study.run_id or None,
                run_id=record.read_text() if record.exists() else None,
                tags=tags,
            )
            stack.enter_context(tracker)
            record.write_text(tracker.run_id)
            trial.set_user_attr("run_id", tracker.run_id)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            tracker.log_params(flatten(config))

            def tell(metrics: dict[str, float], epoch: int) -> None:
                trial.report(metrics[OBJECTIVE], epoch)  # refused where the trial is another worker's by now
                known.add(epoch)
                tracker.log_metrics(metrics, epoch)

            def report(metrics: dict[str, float], epoch: int) -> None:
                if epoch in known:
                    return
                with stop.possible(False):
                    tell(metrics, epoch)
                    if trial.should_prune():
                        raise TrialPruned

            def rest(history: list[dict[str, Any]]) -> list[tuple[dict[str, float], int]]:
                """What was trained, but not told, when an earlier worker died."""
                return [(metrics_of(entry), entry["epoch"]) for entry in history if entry["epoch"] not in known]

            try:
                if trial.user_attrs.get("deaths", 0) >= DEATHS:
                    raise DiedTooOften(f"its worker died {DEATHS} times")
                with stop.possible():
                    history = lead(config, assignments(values), self.bundle, self.words, folder, report)
                for metrics, epoch in rest(history):
                    report(metrics, epoch)
                state = TrialState.COMPLETE
            except TrialPruned:
                history, state = epochs_of(folder), TrialState.PRUNED
                for metrics, epoch in rest(history):
                    tell(metrics, epoch)
            except BaseException as error:
                if not self.study.is_running(trial.number):
                    stack.pop_all()  # the MLflow run is the other worker's to end
                    raise TakenOver("another worker has taken it over, as this one had been silent") from error
                gone = self._is_of_a_dead_peer(error)
                tracker.set_tags({"trial.state": "stopped" if gone or isinstance(error, Stopped) else "failed"})
                if gone:
                    raise PeerDied("another process of this worker has died") from error
                raise
            tracker.set_tags({"trial.state": state.name.lower()})
            best = best_of(history)
            tracker.log_metrics({f"best/{key}": best[key] for key in best if key.startswith("val/")}, 0)
        return history, state

    def _is_of_a_dead_peer(self, error: BaseException) -> bool:
        """Whether it is its end that cut the connection, or had torchrun stop this process too."""
        if distributed.world() == 1:
            return False
        return distributed.caused_by_a_peer(error) or (isinstance(error, Stopped) and one_is_gone(self._processes))

    def _inherit(self, trial: optuna.trial.Trial) -> set[int]:
        """Tell Optuna the epochs that the trial before this one has told, as it goes on after them; their numbers."""
        if "resumes" not in trial.user_attrs:
            return set()
        before = self.study.all_trials()[trial.user_attrs["resumes"]].intermediate_values
        for epoch, value in before.items():
            trial.report(value, epoch)
        return set(before)

    def _take_over(self, trial: optuna.trial.Trial) -> Path:
        """The trial's folder; that of the trial which it resumes gets its name, and is nobody else's any more."""
        folder, origin = self._folder(trial.number), trial.user_attrs.get("resumes")
        while origin is not None and not folder.exists():
            with contextlib.suppress(FileNotFoundError):  # it died before it had one, or elsewhere
                os.rename(self._folder(origin), folder)
            origin = self.study.all_trials()[origin].user_attrs.get("resumes")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _folder(self, number: int) -> Path:
        return self.trials / f"{number:04d}"

    def _died(self, trial: FrozenTrial) -> None:
        """End the MLflow run of a trial whose worker could not."""
        run_id = trial.user_attrs.get("run_id")
        if run_id:
            try:
                tracking.log_to_run(run_id, tags={"trial.state": "stopped"})
                tracking.close_run(run_id, "KILLED")
            except tracking.TrackingError as error:
                log.warning("trial %d: %s", trial.number, error)


def metrics_of(entry: dict[str, Any]) -> dict[str, float]:
    """An epoch's numbers that are tracked."""
    return {key: value for key, value in entry.items() if "/" in key}
