"""``svip compare``: tracked runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from svip import tracking
from svip.cli.shared import app, console, example, numbers_table


@app.command(epilog=example("svip compare --experiment svip/cub --filter \"tags.variant = 'svip'\""))
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="MLflow runs: ids, their beginnings or names, also of trainings and whole pipelines.",
            show_default=False,
        ),
    ] = None,
    experiment: Annotated[
        str, typer.Option("--experiment", help="All evaluations of this MLflow experiment.", show_default=False)
    ] = "",
    query: Annotated[
        str, typer.Option("--filter", help="Only those of it that fit, in MLflow's language.", show_default=False)
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="How gamma was chosen: validation, none, oracle or published.")
    ] = "validation",
    sort: Annotated[str, typer.Option(help="T1, U, S, H or gamma (largest first), name or seed.")] = "H",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for comparison.html, .md and .csv.")] = Path(
        "comparison"
    ),
) -> None:
    """Compare tracked runs: T1, U, S, H with 95 % intervals, and what differs in how they were made."""
    tracking.check_tracked()
    from svip import steps
    from svip.evaluation.run_comparison import describe, groups_table, runs_table

    comparison = steps.compare(runs or [], experiment, query, protocol, sort, str(out))
    for warning in comparison.warnings:
        console.print(f"[bold red]warning:[/] {escape(warning)}")
    names = [line.entry.name for line in comparison.lines]
    _print_widest(*runs_table(comparison), names)
    if comparison.groups:
        _print_widest(*groups_table(comparison))
    for text in [*describe(comparison), *comparison.notes]:
        console.print(escape(text), highlight=False)
    print(f"written to {out}: comparison.csv, comparison.html, comparison.md")


def _print_widest(header: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[str] = ()) -> None:
    """The table with as much as there is room for: all intervals before some, and those before the runs' names."""
    tables = [_table(header, rows, shown, below) for shown in (header, ("H", "H - first")) for below in (names, ())]
    boundless = console.options.update(width=10_000)  # a table's own width is cut to that
    fitting = (table for table in tables if console.measure(table, options=boundless).maximum <= console.width)
    console.print(next(fitting, tables[-1]))


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], with_interval: Sequence[str], names: Sequence[str]
) -> Table:
    """The table for a terminal: the name of a run below its id, and intervals below their number."""
    words = header.index("T1")
    table = numbers_table(header[:words], header[words:])
    for row, name in zip_longest(rows, names):
        cells = [escape(cell) for cell in row[:words]]
        if name:
            cells[0] += f"\n[dim]{escape(name)}[/]"
        for name, cell in zip(header[words:], row[words:], strict=True):
            number, _, interval = cell.partition(" [")
            cells.append(f"{number}\n[dim]\\[{interval}[/]" if interval and name in with_interval else number)
        table.add_row(*cells)
    return table
