"""A study: exactly N trials that end well, however many workers ask, fail, die or are stopped.

The N are *slots*, each a trial that waits in the storage from the start. A worker takes one by Optuna's own
compare-and-set. Whoever fails a trial (its own, or a dead worker's) puts another one into its slot: one with the same
parameters that goes on from the checkpoint, or, after an error, one with new parameters. So no slot is lost or doubled.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from svip.tuning.storage import Liveness, TuningError, open_storage, set_running

log = logging.getLogger(__name__)

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "halving", "none")
DEATHS = 3
"""A trial whose worker has died so often has failed."""
OPEN = 10.0
"""Seconds that a slot may stay empty before any worker fills it: whoever failed its trial has died too."""
ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Settings:
    """What a study is of; it is stored with it, and nobody joins or resumes it with another."""

    preset: str
    config: Mapping[str, Any]
    """Flat configuration that trials vary."""
    space: list[Mapping[str, Any]]
    bundle_sha256: str
    words_sha256: str
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What is another in the ``stored`` ones, as ``name: stored -> own``."""
        found = [
            f"{name}: {stored[name]} -> {own}"
            for name, own in vars(self).items()
            if name not in ("config", "space", "preset") and stored[name] != own
        ]
        if stored["space"] != self.space:
            found.append("the search space")
        keys = {*stored["config"], *self.config}
        for key in sorted(keys):
            before, now = stored["config"].get(key), self.config.get(key)
            if before != now:
                found.append(f"{key}: {before} -> {now}")
        return found


@dataclass
class Study:
    """A study in its storage. ``trials`` are the slots; ``run_id`` the MLflow run that its trials are children of."""

    name: str
    storage: BaseStorage
    liveness: Liveness
    settings: Settings
    trials: int
    run_id: str
    _empty_since: dict[int, float] = field(default_factory=dict)

    def load(self, seed: int = 0) -> optuna.Study:
        """Optuna's study; anew for each trial, as one keeps what it has once read."""
        several = any(row["when"] for row in self.settings.space)
        sampler = build_sampler(self.settings.sampler, self.settings.seed * 1_000_003 + seed, several)
        pruner = build_pruner(self.settings.pruner, self.settings.config["optim.head_epochs"])
        return optuna.load_study(study_name=self.name, storage=self.storage, sampler=sampler, pruner=pruner)

    def set_run_id(self, run_id: str) -> None:
        """The MLflow run that trials are children of from now on."""
        self.run_id = run_id
        self.load().set_user_attr("run_id", run_id)

    def all_trials(self) -> list[FrozenTrial]:
        return self.load().get_trials(deepcopy=False)

    def ended_well(self) -> list[FrozenTrial]:
        """The finished and the pruned trials."""
        return [trial for trial in self.all_trials() if trial.state in ENDED_WELL]

    def errors(self) -> list[FrozenTrial]:
        """The trials that ended with an error of their own, such as a loss that is not finite."""
        return [trial for trial in self.all_trials() if "error" in trial.user_attrs]

    def is_finished(self) -> bool:
        return len(self.ended_well()) >= self.trials

    def tidy(self, died: Callable[[FrozenTrial], None] = lambda trial: None) -> None:
        """Replace the trials of dead workers (``died`` is told of each), and whatever else keeps a slot empty."""

        def failed(trial: FrozenTrial) -> None:
            log.info("trial %d: its worker is gone", trial.number)
            died(trial)
            self.replace(trial)

        self.liveness.fail_dead(self.load(), failed)
        slots = self._slots()
        for slot, trials in slots.items():
            living = [trial for trial in trials if trial.state is not TrialState.FAIL]
            if living:
                self._empty_since.pop(slot, None)
            elif time.monotonic() - self._empty_since.setdefault(slot, time.monotonic()) > OPEN:
                self.replace(trials[-1]) if trials else self.add({}, slot)
            for trial in living[1:]:  # two workers have filled it at the same time
                if trial.state is TrialState.WAITING and set_running(self.storage, trial):
                    self._discard(trial)

    def take(self) -> FrozenTrial | None:
        """A trial that is now this worker's, the resumed ones first; None where there is none to take now."""
        waiting = self.load().get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return min(waiting, key=lambda trial: ("resumes" not in trial.user_attrs, trial.number), default=None)

    def begin(self, trial: FrozenTrial) -> bool:
        """Make a waiting trial a running one; False where another worker was faster."""
        if not set_running(self.storage, trial):
            return False
        others = self._slots()[trial.user_attrs["slot"]]
        if any(other.number < trial.number and other.state is not TrialState.FAIL for other in others):
            self._discard(trial)
            return False
        return True

    def fail(self, trial: FrozenTrial, error: str = "", died: bool = False) -> None:
        """End a running trial of this worker that has failed (``error``), or that another one shall go on with.

        ``died``: as one of the worker's processes has, which counts like the death of the whole worker.
        """
        with contextlib.suppress(UpdateFinishedTrialError):  # it was taken for dead
            if not died:
                self.storage.set_trial_user_attr(trial._trial_id, "error" if error else "stopped", error or True)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            self.replace(self.storage.get_trial(trial._trial_id))

    def is_running(self, number: int) -> bool:
        return self.all_trials()[number].state is TrialState.RUNNING

    def replace(self, failed: FrozenTrial) -> None:
        """Fill the slot of a failed trial again."""
        slot = failed.user_attrs["slot"]
        if "error" in failed.user_attrs:
            self.add({}, slot)
            return
        deaths = failed.user_attrs.get("deaths", 0) + ("stopped" not in failed.user_attrs)
        self.add(failed.params, slot, {"resumes": failed.number, "deaths": deaths})

    def add(self, values: Mapping[str, Any], slot: int, attributes: Mapping[str, Any] | None = None) -> None:
        """Have a trial wait in a slot; parameters that ``values`` does not name are sampled when it begins."""
        self.load().enqueue_trial(dict(values), user_attrs={"slot": slot, **(attributes or {})})

    def fill(self, first: Mapping[str, Any] | None = None) -> None:
        """Have a trial wait in each slot that never had one; slot 0 gets the values ``first``."""
        for slot, trials in self._slots().items():
            if not trials:
                self.add(first or {} if slot == 0 else {}, slot)

    def _slots(self) -> dict[int, list[FrozenTrial]]:
        """Slot -> its trials in order, without discarded ones."""
        slots: dict[int, list[FrozenTrial]] = {slot: [] for slot in range(self.trials)}
        for trial in self.all_trials():
            if "discarded" not in trial.user_attrs and "slot" in trial.user_attrs:
                slots.setdefault(trial.user_attrs["slot"], []).append(trial)
        return slots

    def _discard(self, trial: FrozenTrial) -> None:
        self.storage.set_trial_user_attr(trial._trial_id, "discarded", True)
        self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def create_study(name: str, address: str, out: Path, settings: Settings, trials: int, heartbeat: int) -> Study:
    """A new study, or the one of that name with at least as many trials, and of the same settings.

    Raises TuningError for a study of other settings, or one that was planned with more trials.
    """
    storage, liveness = open_storage(address, out, heartbeat)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    known = study.user_attrs
    if "settings" not in known:
        study.set_user_attr("settings", vars(settings))
    elif differences := settings.differences(known["settings"]):
        raise TuningError(
            f"study {name} was begun with something else ({'; '.join(differences)}); "
            "use the same to go on, or another --out"
        )
    if known.get("trials", 0) > trials:
        raise TuningError(f"study {name} has {known['trials']} trials; expected at least as many, not {trials}")
    study.set_user_attr("trials", trials)
    return Study(name, storage, liveness, settings, trials, known.get("run_id", ""))


def open_study(name: str, address: str, out: Path, heartbeat: int) -> Study:
    """A study that exists; TuningError where it doesn't."""
    storage, liveness = open_storage(address, out, heartbeat)
    try:
        known = optuna.load_study(study_name=name, storage=storage).user_attrs
    except KeyError:
        raise TuningError(f"there is no study {name} in this storage; start it with `svip tune`") from None
    return Study(name, storage, liveness, Settings(**known["settings"]), known["trials"], known.get("run_id", ""))


def build_sampler(name: str, seed: int, conditional: bool = False) -> BaseSampler:
    """TPE over all parameters jointly, which keeps off what other workers are trying; or random."""
    if name == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True, group=conditional, constant_liar=True)


def build_pruner(name: str, frozen: int = 0) -> BasePruner:
    """A pruner that looks at epochs only after the ``frozen`` ones, in which the backbone does not learn, and one more.

    median: below the median of the other trials at that epoch, once five have finished. halving: successive halving.
    """
    first = frozen + 2
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=first)
    return SuccessiveHalvingPruner(min_resource=first) if name == "halving" else NopPruner()
