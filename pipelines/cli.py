"""``svip pipeline run``: a pipeline on this machine; the commands for a cluster are in cluster_cli."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipelines import cluster_cli
from pipelines.catalog import PIPELINES
from pipelines.local import run
from svip.cli.shared import Overrides, Preset, example, print_metrics, print_table
from svip.tracking import shown_uri

Name = Annotated[str, typer.Argument(help=f"Which pipeline: {', '.join(PIPELINES)}.", show_default=False)]

app = typer.Typer(help="Run pipelines, here or on a Kubeflow Pipelines server.", no_args_is_help=True)


@app.command("run", epilog=example("svip pipeline run experiment --preset smoke --out runs/demo"))
def run_command(
    name: Name,
    overrides: Overrides = None,
    preset: Preset = "smoke",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to.", show_default="runs/NAME")
    ] = None,
    variants: Annotated[str, typer.Option(help="Of ablation: all, or names with commas.")] = "",
    seeds: Annotated[int, typer.Option(help="Of ablation: seeds of each variant.")] = 0,
    space: Annotated[str, typer.Option(help="Of tuning: search space, a shipped one or a YAML file.")] = "",
    trials: Annotated[int, typer.Option(help="Of tuning: trials that are to end well.")] = 0,
    workers: Annotated[int, typer.Option(help="Of tuning: workers at a time.")] = 0,
    runner: Annotated[
        str, typer.Option(help="subprocess: each step in a process. docker: each in a container (docs/docker.md).")
    ] = "subprocess",
) -> None:
    """Run a pipeline on this machine; goes on where it was stopped, and shows what has finished."""
    given = {"variants": variants.split(","), "seeds": seeds, "trials": trials, "workers": workers}
    parameters = {option: value for option, value in given.items() if value not in (0, [""])}
    if space:  # a file's path has to be found from wherever a step runs
        parameters["space"] = str(Path(space).resolve()) if space.endswith((".yaml", ".yml")) else space
    out = out or Path("runs") / name
    run(name, preset, overrides or [], out, runner, **parameters)
    show_results(name, out)


app.add_typer(cluster_cli.app)  # without a name: its commands stand beside `run`


def show_results(name: str, out: Path) -> None:
    """Print the accuracies, and where everything is."""
    if name == "ablation":
        print_table(out / "ablation.html")
    else:
        print_metrics(json.loads((out / "metrics.json").read_text()))
        shown = {"Report": "report.html", "Numbers": "metrics.json", "Checkpoint": "checkpoint"}
        for label, path in {**shown, **({"Tuning": "tuning.html"} if name == "tuning" else {})}.items():
            print(f"{label + ':':<12}{out / path}")
    uri = shown_uri()
    print(f"{'MLflow:':<12}{f'mlflow ui --backend-store-uri {shlex.quote(uri)}' if uri.startswith('sqlite') else uri}")
