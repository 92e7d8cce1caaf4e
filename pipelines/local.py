"""Run a pipeline on this machine, with kfp.local."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.catalog import RESULTS, PipelineError, find_pipeline
from pipelines.steplog import StepLog
from svip.config import load_config
from svip.tracking import close_run, tracking_uri


def run(name: str, preset: str, overrides: list[str], out: Path, **parameters: Any) -> None:
    """Run a pipeline with kfp's SubprocessRunner and publish what it made in ``out`` (see RESULTS).

    ``parameters`` are those that this pipeline has beyond the common two.

    Every run keeps its own folder under ``out/kfp``; ``out/pipeline.log`` is the whole log of the last one. Raises
    ConfigError before anything starts, PipelineError with the step and the end of its log when one fails.
    """
    load_config(preset, overrides)
    pipeline = find_pipeline(name)
    strange = sorted(set(parameters) - set(pipeline.component_spec.inputs))
    if strange:
        raise PipelineError(f"pipeline {name} has no {', '.join(strange)}; leave out --{' and --'.join(strange)}")
    from kfp import local

    out.mkdir(parents=True, exist_ok=True)
    runs = out / "kfp"
    before = set(runs.glob(f"{name}-*"))
    with _environment(), (out / "pipeline.log").open("w", buffering=1) as file:
        log = StepLog(sys.stdout, file)
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(runs))
        try:
            with contextlib.redirect_stdout(log):
                pipeline(preset=preset, overrides=overrides, **parameters)
        except KeyboardInterrupt:  # kfp runs no exit handler then
            for folder in set(runs.glob(f"{name}-*")) - before:
                _kill_run(folder)
            raise
        except RuntimeError as error:
            raise PipelineError(_explain(log, out)) from error
    folder = max(set(runs.glob(f"{name}-*")) - before)
    missing = [source for source in RESULTS[name].values() if not (folder / source).exists()]
    if missing:  # a runner may call a failed step a success
        raise PipelineError(f"the pipeline left no {', '.join(missing)} in {folder}; see {out / 'pipeline.log'}")
    _publish(RESULTS[name], folder, out)


def _explain(log: StepLog, out: Path) -> str:
    if not log.failed:
        return f"the pipeline failed after step {log.step!r}; the whole log is {out / 'pipeline.log'}"
    lines = "\n".join(f"   {line}" for line in log.failure)
    return f"\nstep {log.failed!r} failed; the end of its log:\n{lines}\nThe whole log is {out / 'pipeline.log'}"


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What kfp's subprocesses inherit, put back at the end."""
    environment, executable = dict(os.environ), sys.executable
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
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
