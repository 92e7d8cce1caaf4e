"""Commands on runs that are tracked: do one again, register its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from svip import tracking
from svip.cli.shared import app, console, example, numbers_table


@app.command(epilog=example("svip rerun 0123456789abcdef0123456789abcdef --out again"))
def rerun(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN_ID", help="MLflow run of a training, an evaluation or a pipeline.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to.", show_default="reruns/RUN_ID")
    ] = None,
    bundle: Annotated[
        str, typer.Option(help="Where its bundle is now: a folder, or an s3:// address.", show_default="where it was")
    ] = "",
    vectors: Annotated[
        str, typer.Option(help="Folder of its attribute vectors.", show_default="what MLflow keeps of them")
    ] = "",
    tolerance: Annotated[
        float, typer.Option(min=0, help="Allowed difference: points of accuracies, percent of all else.")
    ] = 0.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what made it, and what differs here.")] = False,
) -> None:
    """Do a run again from what MLflow keeps of it; exit code 1 where the numbers don't agree."""
    tracking.check_tracked()
    tracking.find_runs(run_id)  # a wrong id is told before PyTorch is loaded
    from svip import steps
    from svip.evaluation.metrics import ACCURACIES

    folder = out or Path("reruns") / run_id
    result = steps.rerun(run_id, str(folder), bundle, vectors, tolerance, dry_run)
    if dry_run:
        table = Table("what made it", "")
        for what, value in result["lineage"].items():
            if value and not what.startswith("package "):
                table.add_row(what, escape(value))
        console.print(table)
    print_differences(result["differences"])
    if dry_run:
        return
    lines = result["metrics"]
    table = numbers_table(["number"], ["recorded", "rerun"])
    table.add_column("")
    shown_anyway = {f"{part}/{name}" for part in ("val", "test") for name in ACCURACIES}  # rerun.json has all
    for line in lines:
        if line["name"] in shown_anyway or line["verdict"] != "exact":
            values = ["-" if line[key] is None else f"{line[key]:.6g}" for key in ("recorded", "rerun")]
            table.add_row(escape(line["name"]), *values, line["verdict"])
    console.print(table)
    exact = sum(line["verdict"] == "exact" for line in lines)
    print(f"{exact} of {len(lines)} numbers agree exactly, at every step; MLflow run {result['rerun_id']}")
    if not result["agrees"]:
        print("the run was not reproduced")
        raise typer.Exit(1)


@app.command(epilog=example("svip register models/cub"))
def register(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_ID|CHECKPOINT",
            help="MLflow run of a training, an evaluation or a pipeline; or a checkpoint's folder.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option(help="Name of the registered model.", show_default="svip- and the data set")
    ] = "",
) -> None:
    """Register a tested model: the first as champion, another where its H is better beyond its interval."""
    tracking.check_tracked()
    from svip import steps

    done = steps.register(run, name)
    table = numbers_table(["version"], ["H", "95 % interval"])
    for label, interval in (
        (f"{done.version} (this one)", done.h),
        (f"{done.champion} (champion until now)", done.champion_h),
        ("difference", done.difference),
    ):
        if interval is not None:
            table.add_row(label, f"{interval.value:.1f}", f"{interval.low:.1f} to {interval.high:.1f}")
    console.print(table)
    print(f"{done.name} version {done.version} is {done.alias}: {done.reason}")


def print_differences(differences: list[Any]) -> None:
    """What is another now than when the run was recorded."""
    if not differences:
        print("code, environment and machine are those of the run")
        return
    table = Table("what differs", "then", "now")
    for what, then, now in differences:
        table.add_row(what, escape(then) or "none", escape(now) or "none")
    console.print(table)
