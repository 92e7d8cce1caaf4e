"""Sweeps: named variants of one configuration, each trained and evaluated with several seeds.

``sweeps/ablation.yaml`` holds the variants of Table 2, ``sweeps/sensitivity.yaml`` the parameters of Figure 4.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from svip.config import Config, get_value, load_config
from svip.nearest import did_you_mean

log = logging.getLogger(__name__)


class SweepError(ValueError):
    """A variant, parameter or run that doesn't exist; the message names it and those that do."""


class FailedRuns(RuntimeError):
    """A sweep that went to its end without some of its runs; the message names each and its error."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One configuration of a sweep: a row of Table 2, or a point of Figure 4."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    paper: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Data set -> the paper's T1, U, S, H, in percent."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}:{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [*self.variant.overrides, f"train.seed={self.seed}"]

    def folder(self, out: Path) -> Path:
        """Where it lies in a sweep's folder: ``checkpoint`` and ``evaluation`` are inside."""
        return out / self.variant.name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Panel:
    """One parameter of Figure 4."""

    parameter: str
    label: str
    default: float
    """The configuration's own value."""
    points: dict[float, Variant]
    """Ascending values; that of the default is the unchanged configuration, which all panels share."""


def ablation(names: Sequence[str] = ("all",)) -> list[Variant]:
    """The variants of Table 2 in its order; ``names`` picks some. Raises SweepError for an unknown one."""
    chosen = _chosen("ablation", names, "variant")
    return [Variant(name, row["label"], tuple(row["overrides"]), row["paper"]) for name, row in chosen.items()]


def ablation_run(name: str) -> Run:
    """The run of the ablation called ``VARIANT:SEED``, such as ``no_psc:1``."""
    variant, _, seed = name.partition(":")
    if not seed.isdecimal():
        raise SweepError(f"run {name!r}: expected VARIANT:SEED, such as no_psc:1")
    return Run(ablation([variant])[0], int(seed))


def sensitivity(config: Config, names: Sequence[str] = ("all",)) -> list[Panel]:
    """The panels of Figure 4 for a configuration; M is scaled to the model's number of merged groups."""
    unchanged = Variant("default", "unchanged")
    panels = []
    for name, row in _chosen("sensitivity", names, "parameter").items():
        values = row["values"]
        if "of" in row:
            values = [round(value / row["of"] * group_count(config)) for value in values]
        default = get_value(config, row["key"])
        points = {
            value: unchanged
            if value == default
            else Variant(f"{name}-{value:g}", f"{row['label']} = {value:g}", (f"{row['key']}={value:g}",))
            for value in sorted({*values, default})
        }
        panels.append(Panel(name, row["label"], default, points))
    return panels


def group_count(config: Config) -> int:
    """Merged groups G of the model, which is not built for it (no weights, no memory)."""
    import torch  # takes seconds, which a mistyped name should not

    from svip.models.backbone import Backbone

    with torch.device("meta"):
        backbone = Backbone(dataclasses.replace(config.model, weights="none"), config.data.image_size)
    return backbone.grid[0] * backbone.grid[1] // 4


def runs_of(variants: Sequence[Variant], seeds: int) -> list[Run]:
    """Seed by seed, so that a sweep cut short has all variants; the unchanged configuration is the first of each."""
    if seeds < 1:
        raise SweepError(f"seeds={seeds}: expected at least 1")
    unchanged_first = sorted(variants, key=lambda variant: len(variant.overrides) > 0)
    return [Run(variant, seed) for seed in range(seeds) for variant in unchanged_first]


def homes_of(runs: Sequence[Run], preset: str, overrides: Sequence[str]) -> dict[Run, tuple[Run, Config]]:
    """Each run's configuration, and the first run that has the very same one: what equals is trained once."""
    homes: dict[Run, tuple[Run, Config]] = {}
    for run in runs:
        config = load_config(preset, [*overrides, *run.overrides])
        home = next((other for other, (_, its) in homes.items() if its == config), run)
        homes[run] = home, config
    return homes


def work(
    runs: Sequence[Run],
    is_finished: Callable[[Run], bool],
    execute: Callable[[Run], None],
    show: Callable[[Sequence[Run]], None],
) -> None:
    """Execute the runs that are not finished, and ``show`` the finished ones at the start and after each.

    A run that fails doesn't stop the others; FailedRuns names them all at the end.
    """
    finished: list[Run] = []
    waiting: list[Run] = []
    failures: dict[Run, Exception] = {}
    for run in runs:
        try:
            (finished if is_finished(run) else waiting).append(run)
        except Exception as error:  # whatever it is, it concerns this run alone
            failures[run] = error
    show(finished)
    started, before = time.monotonic(), len(runs) - len(waiting)
    for index, run in enumerate(waiting):
        minutes = (time.monotonic() - started) / 60 * (len(waiting) - index) / index if index else 0
        left = f", about {minutes:.0f} minutes left" if index else ""
        log.info("run %d of %d: %s, seed %d%s", before + index + 1, len(runs), run.variant.name, run.seed, left)
        try:
            execute(run)
        except Exception as error:
            log.error("%s failed: %s", run.name, error)
            failures[run] = error
        else:
            finished.append(run)
            show(finished)
    if failures:
        lines = [f"\n  {run.name}: {type(error).__name__}: {error}" for run, error in failures.items()]
        raise FailedRuns(f"{len(failures)} of {len(runs)} runs failed; the table is without them{''.join(lines)}")


def read_metrics(evaluation: Path) -> dict[str, Any]:
    """metrics.json's content of a run that was evaluated."""
    return dict(json.loads((evaluation / "metrics.json").read_text(encoding="utf-8")))


def _chosen(file: str, names: Sequence[str], what: str) -> dict[str, Any]:
    """The rows of a file of ``sweeps`` that ``names`` picks (``all``: each), in the file's order."""
    table = OmegaConf.to_container(OmegaConf.load(Path(str(resources.files("svip") / "sweeps" / f"{file}.yaml"))))
    assert isinstance(table, dict)
    for name in names:
        if name != "all" and name not in table:
            hint = did_you_mean(name, map(str, table))
            raise SweepError(f"unknown {what} {name!r}; {hint}there are: all, {', '.join(map(str, table))}")
    return {str(name): row for name, row in table.items() if "all" in names or name in names}
