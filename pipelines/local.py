"""Run a pipeline on this machine, with kfp.local."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import record
from pipelines.catalog import RESULTS, PipelineError, find_pipeline
from pipelines.steplog import StepLog
from svip.config import Config, load_config
from svip.data.transfer import locked
from svip.models.weights import stored_names
from svip.tracking import close_run, tracking_uri
from svip.tuning.space import load_space

if TYPE_CHECKING:
    from pipelines.containers import Containers
    from pipelines.processes import Processes

log = logging.getLogger(__name__)

RUNNERS = ("subprocess", "docker")
"""Each step in a process of its own, or in a container of its own."""


def run(name: str, preset: str, overrides: list[str], out: Path, runner: str = "subprocess", **parameters: Any) -> None:
    """Run a pipeline with one of kfp's local runners (see RUNNERS) and publish what it made in ``out`` (see RESULTS).

    ``parameters`` are those that this pipeline has beyond the common two.

    Every run keeps its own folder under ``out/kfp``; ``out/pipeline.log`` is the whole log of the last one. Training
    keeps its state in ``out/work`` until a run succeeds, so that the next one goes on where this one ended. Where the
    results are there already, nothing is run. Raises ConfigError, SweepError, SpaceError or PipelineError before
    anything starts, and DataError while another run is at work in ``out``; PipelineError with the step and the end of
    its log when one fails.
    """
    config = load_config(preset, overrides)
    pipeline = find_pipeline(name, parameters)
    if runner not in RUNNERS:
        raise PipelineError(f"unknown runner {runner!r}; there are: {', '.join(RUNNERS)}")
    inputs = pipeline.component_spec.inputs
    asked = record.asked_for(name, preset, config, {key: spec.default for key, spec in inputs.items()} | parameters)
    if record.is_finished(out, asked):
        log.info("%s: the pipeline has finished already, this is what it left; for a new run use another --out", out)
        return
    if "space" in inputs:
        load_space(parameters.get("space", ""), preset, overrides)
    stored_names(config.model.weights)
    out = out.absolute()
    with locked(out, inside=True, wait=False):
        (out / "work").mkdir(parents=True, exist_ok=True)
        jobs = record.begin(out, asked)
        if "continues" in inputs:
            parameters["continues"] = jobs
        runs, space = out / "kfp", str(parameters.get("space", ""))
        before = set(runs.glob(f"{name}-*"))
        with _environment(out), (out / "pipeline.log").open("w", buffering=1) as file:
            steps = StepLog(sys.stdout, file)
            try:
                with _runner(runner, config, preset, out, runs, space), contextlib.redirect_stdout(steps):
                    pipeline(preset=preset, overrides=overrides, **parameters)
            except KeyboardInterrupt:  # kfp runs no exit handler then
                for folder in set(runs.glob(f"{name}-*")) - before:
                    _kill_run(folder)
                print(f"stopped. {_how_to_go_on(out)}", file=sys.stderr)
                raise
            except PipelineError:
                raise
            except RuntimeError as error:
                raise PipelineError(f"{_explain(steps, out)}\n{_how_to_go_on(out)}") from error
        folder = max(set(runs.glob(f"{name}-*")) - before)
        missing = [source for source in RESULTS[name].values() if not (folder / source).exists()]
        if missing:
            raise PipelineError(f"the pipeline left no {', '.join(missing)} in {folder}; see {out / 'pipeline.log'}")
        if name == "tuning":
            _keep_study(folder / RESULTS[name]["study"], out / "work")
        _publish(RESULTS[name], folder, out)
        record.finish(out, asked)
        shutil.rmtree(out / "work", ignore_errors=True)


@contextlib.contextmanager
def _runner(runner: str, config: Config, preset: str, out: Path, runs: Path, space: str) -> Iterator[None]:
    """kfp.local set up for a runner. A signal that stops this process stops its steps, and is a KeyboardInterrupt."""
    from kfp import local

    steps: Processes | Containers
    if runner == "subprocess":
        from pipelines.processes import Processes

        steps = Processes()
    else:
        from pipelines.containers import Containers

        steps = Containers(config, preset, out, space)
    runs.mkdir(exist_ok=True)
    local.init(steps.runner, str(runs), workspace_root="")
    with steps.in_place_of_kfps(), _stopping_with(steps.stop):
        yield


@contextlib.contextmanager
def _stopping_with(stop: Callable[[], None]) -> Iterator[None]:
    def handle(number: int, _: Any) -> None:
        os.write(2, b"\nstopping ...\n")  # print() must not be interrupted by itself
        for stopping in before:  # once is enough; ignoring them would make what is started ignore them too
            signal.signal(stopping, lambda number, _: None)
        stop()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_go_on(out: Path) -> str:
    if record.training_begun(out):
        return f"The same command goes on with the training, whose state is in {out / 'work'}."
    return "The same command starts it again."


def _explain(steps: StepLog, out: Path) -> str:
    if not steps.failed:
        return f"the pipeline failed after step {steps.step!r}; the whole log is {out / 'pipeline.log'}"
    lines = "\n".join(f"   {line}" for line in steps.failure)
    return f"\nstep {steps.failed!r} failed; the end of its log:\n{lines}\nThe whole log is {out / 'pipeline.log'}"


@contextlib.contextmanager
def _environment(out: Path) -> Iterator[None]:
    """What the steps inherit, put back at the end."""
    environment, executable = dict(os.environ), sys.executable
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    os.environ["SVIP_WORK"] = str(out / "work")
    os.environ["SVIP_WORK_KEEP"] = "1"  # a later step may fail, and the next run shall not train again
    os.environ["PYTHONUNBUFFERED"] = "1"  # progress has to be seen while a step runs
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # in a log, each state of a bar is a line of its own
    os.environ.pop("MLFLOW_RUN_ID", None)  # all steps would write to that one run
    # SubprocessRunner puts sys.executable, unquoted, wherever "python3" stands in a command or in an argument. A
    # folder with a space, or with "python3" in its name, breaks that; a name on PATH doesn't.
    os.environ["PATH"] = f"{Path(executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sys.executable = "python3"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You may be attemping to run a task", RuntimeWarning)
            warnings.filterwarnings("ignore", "Task .*: settings", UserWarning)
            yield
    finally:
        sys.executable = executable
        os.environ.clear()
        os.environ.update(environment)


def _kill_run(folder: Path) -> None:
    """End the MLflow run that open_run of this pipeline run started, if it got that far."""
    result = folder / "open-run" / "executor_output.json"
    if result.exists():
        close_run(json.loads(result.read_text())["parameterValues"]["Output"], "KILLED")


def _keep_study(study: Path, work: Path) -> None:
    """Put what the workers shared beside the study's description, where ``svip tune --out`` looks for it."""
    shared = work / "tuning" / json.loads((study / "study.json").read_text())["name"]
    for path in shared.iterdir() if shared.exists() else ():
        path.replace(study / path.name)


def _publish(results: Mapping[str, str], folder: Path, out: Path) -> None:
    """Copy files and link directories of a run to ``out``; each appears at once, or stays as it was."""
    for name, source in results.items():
        part = out / f".{name}.part"
        part.unlink(missing_ok=True)
        if (folder / source).is_dir():
            part.symlink_to(os.path.relpath(folder / source, out), target_is_directory=True)
        else:
            shutil.copyfile(folder / source, part)
        part.replace(out / name)
