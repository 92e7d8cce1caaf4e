"""The command that tunes."""

from __future__ import annotations

from typing import Annotated

import typer

from svip.cli.shared import Out, Overrides, Parent, Preset, app, check_there, example
from svip.config import load_config


@app.command(epilog=example("svip tune --bundle bundle --vectors words -o tuning --trials 40"))
def tune(
    out: Out,
    bundle: Annotated[
        str, typer.Option("--bundle", help="Split bundle: a folder, or its s3:// address.", show_default=False)
    ] = "",
    vectors: Annotated[
        str, typer.Option("--vectors", help="Folder that `svip embed-attributes` wrote.", show_default=False)
    ] = "",
    preset: Preset = "smoke",
    space: Annotated[
        str,
        typer.Option(help="Search space: a shipped one or a YAML file.", show_default="the preset's, else paper"),
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="Trials that are to end well, finished or pruned.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes that train one trial together.", show_default="one for each GPU")
    ] = 0,
    storage: Annotated[
        str,
        typer.Option(help="Database URL, else $SVIP_TUNING_STORAGE.", show_default="OUT/study.journal"),
    ] = "",
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="median, halving (successive halving) or none.")] = "median",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    max_errors: Annotated[int, typer.Option(min=1, help="Failed trials after which the study stops.")] = 10,
    heartbeat: Annotated[
        int, typer.Option(min=1, help="With a database: seconds between signs of life; after four a trial is dead.")
    ] = 15,
    name: Annotated[str, typer.Option(help="Name of the study.", show_default="that of OUT, or a new one")] = "",
    parent_run_id: Parent = "",
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Show the study of --out instead.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where --dashboard is served.")] = 8081,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    overrides: Overrides = None,
) -> None:
    """Search for better values on the validation classes; goes on where it was stopped."""
    if dashboard:
        from svip import steps

        steps.tuning_dashboard(str(out), storage, port)
        return
    for option, value in (("--bundle", bundle), ("--vectors", vectors)):
        if not value:
            raise typer.BadParameter("is needed to tune", param_hint=option)
    load_config(preset, overrides or [])
    check_there(bundle=bundle, vectors=vectors)
    from svip import steps

    if worker:
        steps.tune_worker(bundle, vectors, str(out), max_errors, processes, storage)
        return
    result = steps.tune(
        *(bundle, vectors, str(out), preset, space, trials, workers, storage, sampler, pruner, seed),
        *(overrides or [], parent_run_id, name, max_errors, heartbeat, processes),
    )
    print(f"best: trial {result['trial']}, H {result['H']:.1f} on the validation classes")
    print(f"      {result['shown']}")
    print(f"page: {result['page']}")
    print(f"next: svip train -p {out / 'best.yaml'} --bundle {bundle} --vectors {vectors} --out {out / 'model'}")
