"""Tracked runs side by side: their numbers with intervals, and only what differs in how they were made.

Pure functions of what was read elsewhere. What all runs share stands in one sentence; what differs is a column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from markupsafe import Markup

from svip.changes import short_key, short_value
from svip.evaluation.figures import PALETTE, STYLE, blank, to_svg
from svip.evaluation.intervals import Answers, Interval, bootstrap, bootstrap_h
from svip.evaluation.metrics import ACCURACIES
from svip.evaluation.numbers import mean_and_sd, rounded, rounded_with_spread
from svip.evaluation.pages import render
from svip.evaluation.report import PROTOCOLS
from svip.training.checkpoint import write_atomically, write_text

ON_TEST = ("oracle", "published")
"""Protocols that choose on the test set."""
FACTS = {"variant": "variant", "preset": "preset", "seed": "seed", "code": "code", "bundle_sha256": "data"}
"""What is known of a run beside its settings -> how it is called in a table."""


@dataclass(frozen=True)
class Entry:
    """One evaluation."""

    run_id: str
    name: str
    facts: Mapping[str, str]
    """Keys as in FACTS; what isn't known is empty."""
    settings: Mapping[str, str]
    """Dotted key -> value of what is compared."""
    numbers: Mapping[str, float]
    """T1, U, S, H (percent) and gamma, of one protocol."""
    answers: Answers | None = None
    """What it said to each test image, where that is known."""


@dataclass(frozen=True)
class Line:
    """A row of the table: an entry, its intervals, and its H minus that of the first row."""

    entry: Entry
    intervals: Mapping[str, Interval]
    differing: Mapping[str, str]
    """Header -> value, for all that isn't the same in all runs."""
    difference: Interval | None = None

    @property
    def label(self) -> str:
        values = [
            f"{name}={value}" if name not in ("variant", "preset") else value for name, value in self.differing.items()
        ]
        return " ".join([self.entry.run_id[:8], *values])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    differing: Mapping[str, str]
    seeds: tuple[str, ...]
    numbers: Mapping[str, tuple[float, float]]
    """T1, U, S, H: mean and standard deviation (n - 1)."""


@dataclass(frozen=True)
class Comparison:
    protocol: str
    lines: Sequence[Line]
    groups: Sequence[Group]
    """Only where some configuration ran with several seeds."""
    common: Mapping[str, str]
    """What is known of all runs and the same in all."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(entries: Sequence[Entry], protocol: str, sort: str = "H") -> Comparison:
    """Set entries of one protocol side by side, the largest ``sort`` (a number, or ``name`` or ``seed``) first."""
    if not entries:
        raise ValueError("there are no runs to compare")
    entries = sorted(entries, key=lambda entry: _rank(entry, sort))
    keys = list(dict.fromkeys(key for entry in entries for key in entry.settings))
    settings = [key for key in keys if len({entry.settings.get(key) for entry in entries}) > 1]
    facts = [key for key in FACTS if len({entry.facts.get(key) for entry in entries}) > 1]

    def differing(entry: Entry, leave_out: Sequence[str] = ()) -> dict[str, str]:
        shown = {FACTS[key]: _brief(key, entry.facts.get(key, "")) for key in facts if key not in leave_out}
        trained = {name: shown.pop(name) for name in ("variant", "preset") if name in shown}
        return trained | {short_key(key): short_value(entry.settings.get(key, "-")) for key in settings} | shown

    first = entries[0]
    lines = []
    for entry in entries:
        lines.append(Line(entry, _intervals(entry), differing(entry), _difference(entry, first)))
    groups, notes = _groups(entries, differing)
    common = {FACTS[key]: _brief(key, first.facts.get(key, "")) for key in FACTS if key not in facts}
    common = {name: value for name, value in common.items() if value != "-"}
    if "preset" in common and (changed := _changed_in_all(entries)):
        common["preset"] += f" with {changed}"
    return Comparison(protocol, lines, groups, common, _warnings(entries, protocol), notes)


def write_comparison(comparison: Comparison, out: Path, title: str) -> list[Path]:
    """Write comparison.md, comparison.html and comparison.csv to ``out``; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    about = describe(comparison)
    tables = [runs_table(comparison)] + ([groups_table(comparison)] if comparison.groups else [])
    markdown = [f"# {title}", *(f"**{warning}**" for warning in comparison.warnings)]
    markdown += [_markdown(header, rows) for header, rows in tables]
    write_text(out / "comparison.md", "\n\n".join([*markdown, *about, *comparison.notes]) + "\n")
    page = render(
        "run_comparison",
        title=title,
        warnings=comparison.warnings,
        figure=Markup(to_svg(intervals_figure(comparison), "runs", "H of each run with its 95 % interval")),
        tables=[_page_table(header, rows) for header, rows in tables],
        about=about,
        notes=comparison.notes,
    )
    write_text(out / "comparison.html", page)
    write_atomically(out / "comparison.csv", lambda path: _csv(comparison).to_csv(path, index=False))
    return [out / f"comparison.{suffix}" for suffix in ("html", "md", "csv")]


def runs_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one a run."""
    lines = comparison.lines
    paired = any(line.difference for line in lines)
    header = ["run", *lines[0].differing, *ACCURACIES, "gamma", *(["H - first"] if paired else [])]
    rows = []
    for line in lines:
        cells = [line.entry.run_id[:8], *line.differing.values()]
        cells += [_with_interval(line.entry.numbers.get(name), line.intervals.get(name)) for name in ACCURACIES]
        cells += [rounded(line.entry.numbers.get("gamma"), 3)]
        if paired:
            difference = line.difference
            cells += [_with_interval(difference.value, difference, "+") if difference else "-"]
        rows.append(cells)
    return header, rows


def groups_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one a configuration over its seeds."""
    header = [*comparison.groups[0].differing, "seeds", *ACCURACIES]
    rows = []
    for group in comparison.groups:
        cells = [rounded_with_spread(mean, sd) for mean, sd in group.numbers.values()]
        rows.append([*group.differing.values(), ", ".join(group.seeds), *cells])
    return header, rows


def describe(comparison: Comparison) -> list[str]:
    """What the numbers are, and what all runs have in common."""
    counted = "accuracy by sample" if comparison.protocol == "published" else "mean of per-class top-1"
    about = [f"Percent, {counted}; {PROTOCOLS.get(comparison.protocol, comparison.protocol)}."]
    if any(line.intervals for line in comparison.lines):
        about[0] += (
            " In brackets the 95 % interval over other test images of these classes (bootstrap within each class); "
            "it knows nothing of other seeds."
        )
    if any(line.difference for line in comparison.lines):
        about[0] += " H - first: the difference to the first row, paired image by image."
    if comparison.groups:
        about[0] += " Over seeds: mean ± standard deviation."
    if comparison.common:
        about.append(
            "The same in all: " + ", ".join(f"{name} {value}" for name, value in comparison.common.items()) + "."
        )
    return about


@matplotlib.rc_context(STYLE)
def intervals_figure(comparison: Comparison) -> Any:
    """H of each run as a dot on its 95 % interval, in the table's order."""
    lines = comparison.lines
    figure = blank(7.6, 0.75 + 0.27 * len(lines))
    axes = figure.add_subplot()
    for place, line in enumerate(lines):
        value, interval = line.entry.numbers.get("H", math.nan), line.intervals.get("H")
        colour = PALETTE["accent"] if place == 0 else PALETTE["ink"]
        if interval:
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(value, place, "o", color=colour, markersize=5.5)
    if lines[0].intervals:
        axes.axvline(
            lines[0].entry.numbers["H"], color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (3, 2)), zorder=0
        )
    axes.set_yticks(range(len(lines)), [_cut(line.label) for line in lines], color=PALETTE["ink"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.grid(axis="x")
    axes.set_xlabel("H, %")
    return figure


def _rank(entry: Entry, sort: str) -> tuple[Any, ...]:
    if sort in ("name", "seed"):
        text = entry.name if sort == "name" else entry.facts.get("seed", "")
        return (text.zfill(20) if text.isdecimal() else text, entry.run_id)
    value = entry.numbers.get(sort, math.nan)
    return (math.isnan(value), -value if not math.isnan(value) else 0.0)


def _intervals(entry: Entry) -> dict[str, Interval]:
    return bootstrap(entry.answers) if entry.answers else {}


def _difference(entry: Entry, first: Entry) -> Interval | None:
    """H minus the first one's, with the interval of that; None for itself and where the test images are others."""
    if entry is first or not entry.answers or not first.answers or _data(entry) != _data(first) or not _data(first):
        return None
    return bootstrap_h(entry.answers, first.answers)


def _groups(entries: Sequence[Entry], differing: Any) -> tuple[list[Group], list[str]]:
    """Configurations over their seeds, in the order of the entries; nothing where none has several."""
    by_configuration: dict[tuple[Any, ...], dict[str, list[Entry]]] = {}
    for entry in entries:
        key = (_data(entry), *sorted(entry.settings.items()))
        by_configuration.setdefault(key, {}).setdefault(entry.facts.get("seed", ""), []).append(entry)
    if all(len(by_seed) < 2 for by_seed in by_configuration.values()):
        return [], []
    groups, notes = [], []
    for by_seed in by_configuration.values():
        once = [same[0] for same in by_seed.values()]
        repeated = [seed for seed, same in by_seed.items() if len(same) > 1]
        if repeated:
            notes.append(f"Seed {', '.join(repeated)} ran more than once: its first row counts in the means.")
        if len({entry.facts.get("code") for entry in once}) > 1:
            notes.append("Seeds of one configuration ran with different code.")
        numbers = {name: mean_and_sd([entry.numbers.get(name, math.nan) for entry in once]) for name in ACCURACIES}
        groups.append(Group(differing(once[0], ("seed", "code")), tuple(sorted(by_seed)), numbers))
    return groups, list(dict.fromkeys(notes))


def _warnings(entries: Sequence[Entry], protocol: str) -> list[str]:
    warnings = []
    bundles = [_data(entry) for entry in entries]
    if len(set(bundles)) > 1:
        counted = ", ".join(f"{name[:8] or 'unknown'} ({bundles.count(name)})" for name in dict.fromkeys(bundles))
        warnings.append(
            f"Not comparable: these runs were tested on different data ({counted}). A higher number of one says "
            "nothing against another; compare runs of the same bundle, with a filter on tags.bundle_sha256."
        )
    if protocol in ON_TEST:
        warnings.append("No results: this protocol chooses on the test set.")
    if any(entry.facts.get("code", "").endswith("-dirty") for entry in entries):
        warnings.append("Some runs had uncommitted changes in the code (-dirty).")
    return warnings


def _csv(comparison: Comparison) -> pd.DataFrame:
    records = []
    for line in comparison.lines:
        entry = line.entry
        record: dict[str, Any] = {"run_id": entry.run_id, "name": entry.name, "protocol": comparison.protocol}
        record |= {key: entry.facts.get(key, "") for key in FACTS}
        for name in ACCURACIES:
            record[name] = entry.numbers.get(name)
            if name in line.intervals:
                record |= {f"{name}_low": line.intervals[name].low, f"{name}_high": line.intervals[name].high}
        record["gamma"] = entry.numbers.get("gamma")
        if line.difference:
            difference = line.difference
            record |= {"H_difference": difference.value}
            record |= {"H_difference_low": difference.low, "H_difference_high": difference.high}
        keys = {key for other in comparison.lines for key in other.entry.settings}
        varying = [k for k in sorted(keys) if len({other.entry.settings.get(k) for other in comparison.lines}) > 1]
        records.append(record | {key: entry.settings.get(key) for key in varying})
    return pd.DataFrame(records)


def _changed_in_all(entries: Sequence[Entry]) -> str:
    """``epochs=2 lr=1e-5``: what all runs have otherwise than their preset (the seed stands elsewhere)."""
    every = [entry.facts.get("changes", "").split(", ") for entry in entries]
    shared = [change.partition("=") for change in every[0] if change and all(change in one for one in every)]
    return " ".join(f"{short_key(key)}={short_value(value)}" for key, _, value in shared if key != "train.seed")


def _data(entry: Entry) -> str:
    return entry.facts.get("bundle_sha256", "")


def _brief(key: str, value: str) -> str:
    """Eight characters of a digest are enough (and whether code was uncommitted), and the name of a preset's file."""
    if key in ("code", "bundle_sha256"):
        value = value[:8] + ("-dirty" if value.endswith("-dirty") else "")
    return (Path(value).name if value.endswith(".yaml") else value) or "-"


def _with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    return rounded(value, 1, sign) + (f" [{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]" if interval else "")


def _page_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Any, int, Any]:
    """Header, number of columns with words, and rows of (text, interval)."""
    words = header.index(ACCURACIES[0])
    cells = [[(cell, "") for cell in row[:words]] for row in rows]
    for line, row in zip(cells, rows, strict=True):
        line += [(value, interval.rstrip("]")) for value, _, interval in (cell.partition(" [") for cell in row[words:])]
    return header, words, cells


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
