"""Search spaces: YAML files keyed by configuration paths, checked against the configuration before the first trial.

optim.lr: {low: 1e-6, high: 1e-4, log: true}
model.contextualize: {choices: [unselected, all]}
loss.lambda1: {low: 0.1, high: 5, when: {model.contextualize: [unselected]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import OmegaConf

from svip.config import Config, ConfigError, get_value, load_config
from svip.nearest import did_you_mean
from svip.sweep import group_count

if TYPE_CHECKING:
    from optuna.trial import Trial

TUNABLE = ("model.", "loss.", "optim.", "data.train_view", "data.test_view", "data.flip", "train.precision")
"""Beginnings of the keys that a trial may change; data and evaluation are the same for all of them."""
OPTIONS = ("low", "high", "log", "step", "of", "choices", "when")
GROUPS = "model.selected_groups"


class SpaceError(ValueError):
    """A search space that can't be searched; the message names the file, the key, and what was expected."""


@dataclass(frozen=True)
class Parameter:
    """One line of a search space: a range (``low`` to ``high``) or ``choices``."""

    key: str
    whole: bool = False
    """Whether the values are integers."""
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Earlier parameters and those of their values with which this one is searched; otherwise it stays the preset's."""

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether it is searched, given the values of the earlier ones (of those that are searched themselves)."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())

    def suggest(self, trial: Trial) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def contains(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        on_grid = self.step is None or math.isclose(
            (value - self.low) / self.step, round((value - self.low) / self.step), abs_tol=1e-9
        )
        return self.low <= value <= self.high and on_grid

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values whose configurations are checked before the first trial."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


Space = tuple[Parameter, ...]


def shipped_spaces() -> list[str]:
    """Names of the spaces that ship with the package, such as ``paper``."""
    return sorted(path.stem for path in Path(str(resources.files("svip") / "spaces")).glob("*.yaml"))


def find_space(name: str, preset: str) -> Path:
    """The file of a shipped space, or the YAML file of that name; SpaceError where it does not exist.

    Empty: the shipped one of the preset's name, else ``paper``.
    """
    name = name or (preset if preset in shipped_spaces() else "paper")
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise SpaceError(f"search space {name} does not exist")
        return Path(name)
    if name not in shipped_spaces():
        hint = did_you_mean(name, shipped_spaces())
        raise SpaceError(
            f"unknown search space {name!r}; {hint}there are: {', '.join(shipped_spaces())}, or a path to a .yaml"
        )
    return Path(str(resources.files("svip") / "spaces" / f"{name}.yaml"))


def load_space(name: str, preset: str, overrides: Sequence[str] = ()) -> Space:
    """The space that ``find_space`` finds, checked with the configuration that it varies. Raises SpaceError."""
    path = find_space(name, preset)
    try:
        rows = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML errors have no common base in OmegaConf
        raise SpaceError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(rows, dict) or not rows:
        raise SpaceError(f"{path}: expected lines such as `optim.lr: {{low: 1e-6, high: 1e-4, log: true}}`")
    groups = group_count(load_config(preset, overrides))
    space: list[Parameter] = []
    for key, row in rows.items():
        space.append(_parameter(str(key), row, space, groups, str(path)))
    for parameter in space:
        _check_corners(parameter, space, preset, overrides, groups, str(path))
    return tuple(space)


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """The trial's value of each parameter that applies."""
    values: dict[str, Any] = {}
    for parameter in space:
        if parameter.applies(values):
            values[parameter.key] = parameter.suggest(trial)
    return values


def assignments(values: Mapping[str, Any]) -> list[str]:
    """As overrides of a preset."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def shown(values: Mapping[str, Any]) -> str:
    """Parameters for people: the keys' last parts, and four digits."""
    parts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values())
    return " ".join(f"{key.rsplit('.', 1)[-1]}={part}" for key, part in zip(values, parts, strict=True))


def own_values(space: Space, config: Config) -> dict[str, Any] | None:
    """The configuration's own values of the parameters; None where one is outside of its range."""
    values: dict[str, Any] = {}
    for parameter in space:
        if parameter.applies(values):
            values[parameter.key] = get_value(config, parameter.key)
            if not parameter.contains(values[parameter.key]):
                return None
    return values


def _parameter(key: str, row: Any, earlier: Sequence[Parameter], groups: int, source: str) -> Parameter:
    where, kind = f"{source}: {key}", _type_of(key, source)
    if not key.startswith(TUNABLE) or kind not in (int, float, bool, str):
        raise SpaceError(f"{where} can't be tuned; expected a single value below {', '.join(TUNABLE)}")
    if not isinstance(row, dict):
        raise SpaceError(f"{where}: expected {{low: .., high: ..}} or {{choices: [..]}}, found {row!r}")
    for option in row:
        if option not in OPTIONS:
            hint = did_you_mean(str(option), OPTIONS)
            raise SpaceError(f"{where}: unknown {option!r}; {hint}there are: {', '.join(OPTIONS)}")
    when = _condition(where, row.get("when", {}), earlier)
    if "choices" in row:
        return Parameter(key, choices=_choices(where, row, kind), when=when)
    return _range(where, key, row, kind, when, groups)


def _type_of(key: str, source: str) -> Any:
    """The annotated type of a configuration key; SpaceError with the nearest one for a key that doesn't exist."""
    try:
        load_config("smoke", [f"{key}=null"])
    except ConfigError as error:
        if "unknown key" in str(error):
            raise SpaceError(f"{source}: {str(error).removeprefix('override: ')}") from None
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else Any
    return kind


def _choices(where: str, row: Mapping[str, Any], kind: type) -> tuple[Any, ...]:
    choices = row["choices"]
    if {"low", "high", "log", "step", "of"} & row.keys():
        raise SpaceError(f"{where}: expected either choices or low and high")
    if not isinstance(choices, list) or len(choices) < 2 or len({json.dumps(c) for c in choices}) < len(choices):
        raise SpaceError(f"{where}: choices: expected a list of at least two different values, found {choices!r}")
    wrong = [choice for choice in choices if not _is(choice, kind)]
    if wrong:
        raise SpaceError(f"{where}: choices: expected {kind.__name__}, found {wrong[0]!r}")
    return tuple(float(choice) if kind is float else choice for choice in choices)


def _range(
    where: str, key: str, row: Mapping[str, Any], kind: type, when: Mapping[str, tuple[Any, ...]], groups: int
) -> Parameter:
    if not {"low", "high"} <= row.keys():
        raise SpaceError(f"{where}: expected low and high, or choices")
    if kind not in (int, float):
        raise SpaceError(f"{where}: a {kind.__name__} has no range; expected choices")
    log = row.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{where}: log: expected true or false, found {log!r}")
    for option in ("low", "high", "step", "of"):
        if option in row and not _is(row[option], kind):
            raise SpaceError(f"{where}: {option}: expected {kind.__name__}, found {row[option]!r}")
    low, high, step = kind(row["low"]), kind(row["high"]), row.get("step")
    if "of" in row:
        if key != GROUPS or row["of"] < 1:
            raise SpaceError(
                f"{where}: `of` is the number of groups that {GROUPS} is counted in; expected it only there"
            )
        low, high = (max(1, round(bound / row["of"] * groups)) for bound in (low, high))
    if low >= high:
        raise SpaceError(f"{where}: low {low:g} is not below high {high:g}")
    if log and (low <= 0 or step is not None):
        raise SpaceError(f"{where}: a log scale wants low above 0 and no step")
    parameter = Parameter(key, kind is int, low, high, log, step, when=when)
    if step is not None and (step <= 0 or not parameter.contains(high)):
        raise SpaceError(f"{where}: high {high:g} is not low {low:g} and a number of steps of {step:g}")
    return parameter


def _condition(where: str, condition: Any, earlier: Sequence[Parameter]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(condition, dict):
        raise SpaceError(f"{where}: when: expected {{PARAMETER: [VALUE, ..]}}, found {condition!r}")
    known = {parameter.key: parameter for parameter in earlier}
    for key, values in condition.items():
        if key not in known:
            raise SpaceError(f"{where}: when: {key!r} is no parameter above it in the file")
        if not known[key].choices:
            raise SpaceError(f"{where}: when: {key} has no choices to depend on")
        if not isinstance(values, list) or not values:
            raise SpaceError(f"{where}: when: {key}: expected a list of its choices, found {values!r}")
        for value in values:
            if value not in known[key].choices:
                raise SpaceError(f"{where}: when: {key}: {value!r} is none of its choices")
    return {str(key): tuple(values) for key, values in condition.items()}


def _check_corners(
    parameter: Parameter, space: Sequence[Parameter], preset: str, overrides: Sequence[str], groups: int, source: str
) -> None:
    given: dict[str, Any] = {}
    for key, allowed in parameter.when.items():
        given[key] = allowed[0]
    for value in parameter.corners:
        try:
            config = load_config(preset, [*overrides, *assignments({**given, parameter.key: value})])
        except ConfigError as error:
            raise SpaceError(f"{source}: {parameter.key}: {error}") from None
        if parameter.key == GROUPS and value > groups and config.model.contextualize != "none":
            raise SpaceError(f"{source}: {GROUPS}: {value} is more than the {groups} groups of the model")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
