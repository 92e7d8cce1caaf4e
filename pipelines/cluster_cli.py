"""``svip pipeline compile|submit|resubmit|status|logs|stop``: pipelines on a Kubeflow Pipelines server."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.catalog import PIPELINES
from pipelines.settings import Cluster, SettingsError, load_cluster
from svip.cli.shared import Overrides, Preset, console, example
from svip.config import ConfigError, load_config

if TYPE_CHECKING:
    from pipelines.server import Run, Server

NAME_LENGTH = 100
"""Characters of a run's name."""
STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""

Name = Annotated[str, typer.Argument(help=f"Which pipeline: {', '.join(PIPELINES)}.", show_default=False)]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `submit` prints it.", show_default=False)]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="What the cluster has to know: a file as infra/cluster.yaml.")
]
Host = Annotated[str, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="Address of the API, or of the UI.")]
Namespace = Annotated[str, typer.Option(envvar="SVIP_NAMESPACE", help="Namespace of the runs, in place of the file's.")]
Token = Annotated[
    str, typer.Option(envvar="SVIP_KFP_TOKEN", show_default=False, help="Bearer token; better from the environment.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(envvar="KF_PIPELINES_SA_TOKEN_PATH", help="File with the token, read anew when it has expired."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the run; the exit code is 0 only if it succeeds.")]
Variants = Annotated[str, typer.Option(help="Of ablation: all, or names with commas.")]
PipelineSeeds = Annotated[int, typer.Option("--seeds", help="Of ablation: seeds of each variant.")]
Space = Annotated[str, typer.Option(help="Of tuning: the search space.")]
Trials = Annotated[int, typer.Option(help="Of tuning: trials in all.")]
Workers = Annotated[int, typer.Option(help="Of tuning: how many try at the same time.")]

app = typer.Typer()


@app.command("compile", epilog=example("svip pipeline compile experiment -p paper/cub --out experiment.yaml"))
def compile_command(
    name: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="The YAML file to write.")],
    overrides: Overrides = None,
    preset: Preset = "smoke",
    cluster: ClusterFile = None,
    variants: Variants = "",
    seeds: PipelineSeeds = 0,
    space: Space = "",
    trials: Trials = 0,
    workers: Workers = 0,
) -> None:
    """Write a pipeline as the YAML file that any Kubeflow Pipelines 2 server takes; its UI asks for other values."""
    from pipelines.compiling import compile_pipeline  # kfp takes a while, and every command of svip loads this module

    parameters = _parameters(preset, overrides or [], variants, seeds, space, trials, workers)
    steps = compile_pipeline(name, out, load_cluster(cluster) if cluster else None, parameters)
    print(f"{out}: pipeline {name}, image {', '.join(sorted(set(steps.values())))}")
    print(f"steps: {', '.join(steps)}")


@app.command("submit", epilog=example("svip pipeline submit experiment -p paper/cub --cluster cluster.yaml --wait"))
def submit_command(
    name: Name,
    overrides: Overrides = None,
    preset: Preset = "smoke",
    cluster: ClusterFile = None,
    variants: Variants = "",
    seeds: PipelineSeeds = 0,
    space: Space = "",
    trials: Trials = 0,
    workers: Workers = 0,
    wait: Wait = False,
    host: Host = "",
    namespace: Namespace = "",
    token: Token = "",
    token_file: TokenFile = None,
) -> None:
    """Run a pipeline on a Kubeflow Pipelines server."""
    from pipelines.compiling import compile_pipeline

    changes = overrides or []
    parameters = _parameters(preset, changes, variants, seeds, space, trials, workers)
    settings = load_cluster(cluster) if cluster else Cluster()
    if not settings.has_tracking():
        raise SettingsError(
            f"{cluster or 'no cluster file'}: the steps are told no MLflow server, so none would find another's runs; "
            "give --cluster FILE with MLFLOW_TRACKING_URI in steps.default.env or steps.default.secrets, as "
            "infra/cluster.yaml has it"
        )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{name}.yaml"
        compile_pipeline(name, package, settings, parameters)
        server = _server(host or settings.host or "", namespace or settings.namespace, token, token_file)
        run_id = server.submit(
            package,
            f"svip/{load_config(preset, changes).data.dataset}",
            run_name(name, preset, changes),
            parameters,
            settings.service_account,
            settings.pipeline_root,
        )
    _show_started(server, run_id, wait)


@app.command("resubmit", epilog=example("svip pipeline resubmit RUN_ID --wait"))
def resubmit_command(
    run_id: RunId,
    wait: Wait = False,
    cluster: ClusterFile = None,
    host: Host = "",
    namespace: Namespace = "",
    token: Token = "",
    token_file: TokenFile = None,
) -> None:
    """Run a failed run's pipeline once more; what it had finished comes from Kubeflow's cache."""
    server = _open(cluster, host, namespace, token, token_file)
    _show_started(server, server.resubmit(run_id), wait)


@app.command("status", epilog=example("svip pipeline status RUN_ID"))
def status_command(
    run_id: RunId,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    wait: Wait = False,
    cluster: ClusterFile = None,
    host: Host = "",
    namespace: Namespace = "",
    token: Token = "",
    token_file: TokenFile = None,
) -> None:
    """Show the steps of a run, their states and how long they took."""
    from pipelines.server import shown

    server = _open(cluster, host, namespace, token, token_file)
    if wait:
        _follow(server, run_id)
        return
    run = server.run(run_id)
    if as_json:
        print(json.dumps(run.to_dict(), indent=2))
        return
    print(f"{run.name}: {run.state.lower()}{f' ({run.error})' if run.error else ''}")
    table = Table("step", "state", "took", "error")
    for task in run.tasks:
        table.add_row(task.name, task.state.lower(), shown(task.seconds), task.error)
    console.print(table)
    print(server.link(run_id))


@app.command("logs", epilog=example("svip pipeline logs RUN_ID --step train"))
def logs_command(
    run_id: RunId,
    step: Annotated[str, typer.Option(help="One step, such as train.", show_default="all")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the step ends.")] = False,
    cluster: ClusterFile = None,
    namespace: Namespace = "",
) -> None:
    """Print what the steps of a run said, from their pods (of the kubeconfig's cluster)."""
    from pipelines.pods import print_logs

    settings = load_cluster(cluster) if cluster else Cluster()
    print_logs(namespace or settings.namespace, run_id, _say, step.replace("-", "_"), follow)


@app.command("stop", epilog=example("svip pipeline stop RUN_ID"))
def stop_command(
    run_id: RunId,
    cluster: ClusterFile = None,
    host: Host = "",
    namespace: Namespace = "",
    token: Token = "",
    token_file: TokenFile = None,
) -> None:
    """Stop a run; the pipeline's last step closes its MLflow run and ends its TrainJob."""
    _open(cluster, host, namespace, token, token_file).stop(run_id)
    print(f"stopping {run_id}")


def _parameters(
    preset: str, overrides: list[str], variants: str, seeds: int, space: str, trials: int, workers: int
) -> dict[str, Any]:
    """Those of a pipeline, checked: what is not given is left to its defaults."""
    load_config(preset, overrides)
    if preset.endswith((".yaml", ".yml")):
        raise ConfigError(f"preset {preset}: a cluster's steps don't see this file; give a shipped one and overrides")
    names = variants.split(",") if variants else []
    own = {"variants": names, "seeds": seeds, "space": space, "trials": trials, "workers": workers}
    return {"preset": preset, "overrides": overrides, **{key: value for key, value in own.items() if value}}


def run_name(pipeline: str, preset: str, overrides: list[str]) -> str:
    """What a run is: ``experiment paper/cub lr=1e-5 2026-11-25 19:20``, without what the name has no room for."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    changes = [
        override.partition("=")[0].rsplit(".", 1)[-1] + "=" + override.partition("=")[2] for override in overrides
    ]
    what = " ".join([pipeline, preset, *changes])
    room = NAME_LENGTH - len(when) - 1
    return f"{what if len(what) <= room else what[: room - 3] + '...'} {when}"


def _open(cluster: Path | None, host: str, namespace: str, token: str, token_file: Path | None) -> Server:
    settings = load_cluster(cluster) if cluster else Cluster()
    return _server(host or settings.host or "", namespace or settings.namespace, token, token_file)


def _server(host: str, namespace: str, token: str, token_file: Path | None) -> Server:
    from pipelines.server import Server, ServerError

    def read_token() -> str:
        if token or not token_file:
            return token
        try:
            return token_file.read_text().strip()
        except OSError as error:
            raise ServerError(f"token file {token_file} can't be read: {error.strerror}") from error

    return Server(host, namespace, read_token)


def _show_started(server: Server, run_id: str, wait: bool) -> None:
    _say(f"run {run_id}\n{server.link(run_id)}")
    if wait:
        _follow(server, run_id)
    else:
        _say(f"follow it with: svip pipeline status {run_id} --wait")


def _follow(server: Server, run_id: str) -> None:
    """Until the run ends; ServerError unless it succeeded."""
    from pipelines.server import PAUSE, ServerError

    pause = float(os.environ.get("SVIP_POLL_SECONDS") or PAUSE)
    try:
        run = server.follow(run_id, lambda text: _say(f"{datetime.now():%H:%M:%S} {text}"), pause)
    except KeyboardInterrupt:
        _say(f"\nthe run goes on; follow it with: svip pipeline status {run_id} --wait")
        _say(f"or end it with: svip pipeline stop {run_id}")
        raise typer.Exit(STOPPED) from None
    if run.state != "SUCCEEDED":
        raise ServerError(_why(run))
    _say(f"run {run_id} succeeded")


def _why(run: Run) -> str:
    if run.state == "CANCELED":
        return f"run {run.id} was stopped"
    what = f" in {', '.join(run.failed)}" if run.failed else ""
    error = f": {run.error}" if run.error else ""
    logs = f"svip pipeline logs {run.id}" + (f" --step {run.failed[0]}" if run.failed else "")
    return f"run {run.id} {run.state.lower()}{what}{error}; see `{logs}`; `svip pipeline resubmit {run.id}` goes on"


def _say(text: str) -> None:
    print(text, flush=True)
