"""The table of a sweep (Table 2's layout, over seeds) and the panels of Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy import stats

from svip.evaluation.figures import PALETTE, STYLE, blank, to_svg
from svip.evaluation.metrics import ACCURACIES
from svip.evaluation.numbers import mean_and_sd, rounded, rounded_with_spread
from svip.evaluation.pages import render
from svip.evaluation.report import PROTOCOLS
from svip.training.checkpoint import write_atomically, write_text

LINES = {"T1": ("green", "o"), "U": ("orange", "s"), "S": ("muted", "^"), "H": ("accent", "D")}

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Variant's name -> seed -> protocol -> T1, U, S, H (percent)."""


@dataclass(frozen=True)
class Row:
    """A row of the table: the variant whose numbers it shows, and the paper's T1, U, S, H beside them."""

    variant: str
    label: str
    paper: Sequence[float] = ()


def write_comparison(
    out: Path,
    name: str,
    title: str,
    rows: Sequence[Row],
    results: Results,
    reference: str,
    seeds: int,
    made_with: str,
    figure: Figure | None = None,
) -> Path:
    """Write the table as ``name``.md, .csv and .html (and a figure as .png and .svg); the page's path.

    ``reference``: the variant from which the differences in H are taken; ``seeds``: those that each row should have;
    ``made_with``: the sentence below the table that says what was run.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = {protocol: summarize(rows, results, protocol, reference) for protocol in shown_protocols(results)}
    sections = [
        (_about(protocol, seeds, any(row.paper for row in rows)), *_cells(table, reference, seeds))
        for protocol, table in tables.items()
    ]
    markdown = []
    for about, header, cells in sections:
        lines = [header, ["---", *["--:"] * (len(header) - 1)], *cells]
        markdown += ["\n".join("| " + " | ".join(line) + " |" for line in lines), about]
    write_text(out / f"{name}.md", "\n\n".join([*markdown, made_with]) + "\n")
    whole = pd.concat([table.assign(protocol=protocol) for protocol, table in tables.items()])
    write_atomically(out / f"{name}.csv", lambda path: whole.to_csv(path, index=False))
    if figure is not None:
        for suffix in ("png", "svg"):
            _save(figure, out / f"{name}.{suffix}")
    page = render(
        "comparison",
        title=title,
        sections=sections,
        made_with=made_with,
        figure=None if figure is None else Markup(to_svg(figure, name, title)),
    )
    write_text(out / f"{name}.html", page)
    return out / f"{name}.html"


def shown_protocols(results: Results) -> list[str]:
    """The protocols that a table shows: ``common_protocol``, and ``published`` where all runs have that too."""
    first = common_protocol(results)
    everywhere = all("published" in protocols for by_seed in results.values() for protocols in by_seed.values())
    return [first, "published"] if everywhere and first != "published" else [first]


def common_protocol(results: Results) -> str:
    """The protocol that a table shows: ``validation`` where all runs have it, else the first that they list."""
    listed = [list(protocols) for by_seed in results.values() for protocols in by_seed.values()]
    shared = [name for name in listed[0] if all(name in names for names in listed)]
    if not shared:
        raise ValueError("the runs have no protocol in common; evaluate them all with the same evaluation.protocols")
    return "validation" if "validation" in shared else shared[0]


def summarize(rows: Sequence[Row], results: Results, protocol: str, reference: str) -> pd.DataFrame:
    """One row a variant: number of seeds, mean and standard deviation (n - 1) of T1, U, S, H, and the difference in H.

    The difference is paired: over the seeds that ``reference`` has too, with the half-width of its 95 % t interval.
    What can't be computed is NaN.
    """
    records = []
    for row in rows:
        runs = results.get(row.variant, {})
        record: dict[str, Any] = {"variant": row.variant, "label": row.label, "seeds": len(runs)}
        for column in ACCURACIES:
            values = [protocols[protocol][column] for protocols in runs.values()]
            record[column], record[f"{column}_sd"] = mean_and_sd(values)
        pairs = {
            seed: runs[seed][protocol]["H"] - other[protocol]["H"]
            for seed, other in results.get(reference, {}).items()
            if seed in runs and row.variant != reference
        }
        record["difference"], spread = mean_and_sd(list(pairs.values()))
        n = len(pairs)
        record["interval"] = stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) if n > 1 else math.nan
        for column, value in zip(ACCURACIES, row.paper, strict=False):
            record[f"paper_{column}"] = value
        records.append(record)
    return pd.DataFrame(records)


@matplotlib.rc_context(STYLE)
def sensitivity_figure(
    panels: Sequence[tuple[str, float, Mapping[float, str]]], results: Results, protocol: str
) -> Figure:
    """Figure 4: a panel a parameter, T1, U, S and H (percent) over its values, bars of one standard deviation.

    panels: label, default value, and value -> variant, ascending. Values stand evenly, as in the paper; the default
    is the dashed line.
    """
    figure = blank(2.9 * len(panels) + 0.4, 3.2)
    for index, (label, default, points) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1, sharey=figure.axes[0] if index else None)
        axes.axvline(list(points).index(default), color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (3, 2)))
        for line, (column, (colour, marker)) in enumerate(LINES.items()):
            places, means, spreads = [], [], []
            for place, variant in enumerate(points.values()):
                values = [protocols[protocol][column] for protocols in results.get(variant, {}).values()]
                if values:
                    mean, spread = mean_and_sd(values)
                    places.append(place + 0.05 * (line - 1.5))  # side by side, for the bars
                    means.append(mean)
                    spreads.append(spread)  # NaN, which draws nothing, for a single seed
            axes.errorbar(
                places,
                means,
                spreads,
                color=PALETTE[colour],
                marker=marker,
                markersize=4.5,
                linewidth=2.0 if column == "H" else 1.3,
                elinewidth=0.9,
                capsize=2.5,
                label=column if index == 0 else None,
            )
        axes.set_xticks(range(len(points)), [f"{value:g}" for value in points])
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.set_xlabel(f"({'abcd'[index]}) {label}")
        axes.grid(axis="y")
        axes.tick_params(labelleft=index == 0)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].plot([], [], color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (3, 2)), label="default")
    figure.legend(loc="outside upper left", ncols=5, fontsize=9, columnspacing=1.4)
    return figure


def _about(protocol: str, seeds: int, has_paper: bool) -> str:
    """What the numbers of a table are."""
    counted = "accuracy by sample" if protocol == "published" else "mean of per-class top-1"
    about = f"Percent, {counted}; {PROTOCOLS.get(protocol, protocol)}."
    if seeds > 1:
        about += " Mean ± standard deviation over seeds; differences are paired by seed, with their 95 % interval."
    if has_paper:
        about += " The paper's are of the published protocol: epoch and offset chosen on the test set, by sample."
    return about


def _cells(table: pd.DataFrame, reference: str, seeds: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; the columns of seeds and of the paper stand only where they say something."""
    short = bool((table["seeds"] < seeds).any())
    paper = [f"paper_{column}" for column in ACCURACIES if f"paper_{column}" in table]
    header = ["Variant", *(["seeds"] if short else []), *ACCURACIES, f"H - {reference}"]
    header += [column.replace("_", " ") for column in paper]
    rows = []
    for record in table.to_dict("records"):
        cells = [str(record["label"]), *([f"{record['seeds']} of {seeds}"] if short else [])]
        cells += [rounded_with_spread(record[column], record[f"{column}_sd"]) for column in ACCURACIES]
        cells += [rounded_with_spread(record["difference"], record["interval"], sign="+")]
        rows.append([*cells, *(rounded(record[column]) for column in paper)])
    return header, rows


@matplotlib.rc_context(STYLE)
def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix[1:]  # the temporary name has another
    write_atomically(path, lambda part: figure.savefig(part, format=kind, dpi=160))
