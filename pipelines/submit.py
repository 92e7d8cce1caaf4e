"""``svip pipeline ...``: compile a pipeline, or run it on this machine."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from svip.cli.shared import Overrides, Preset, example, print_metrics, print_table
from svip.config import load_config
from svip.tracking import close_run, shown_uri, tracking_uri

DATA = {"bundle": "prepare-data/bundle", "vectors": "embed-attributes/vectors"}
RESULTS = {
    "experiment": {
        **DATA,
        "checkpoint": "train/checkpoint",
        "evaluation": "evaluate/evaluation",
        "metrics.json": "evaluate/evaluation/metrics.json",
        "report.html": "report/page",
        "results.md": "report/files/results.md",
    },
    "ablation": {
        **DATA,
        "ablation.md": "ablate-table/files/ablation.md",
        "ablation.csv": "ablate-table/files/ablation.csv",
        "ablation.html": "ablate-table/page",
    },
}
"""Pipeline -> what a run leaves in its output folder -> where Kubeflow put it, as TASK/ARTIFACT."""
PIPELINES = tuple(RESULTS)
"""Each is the function of that name in the module of that name."""
Name = Annotated[str, typer.Argument(help=f"Which pipeline: {', '.join(PIPELINES)}.", show_default=False)]
TAIL = 12
"""Lines of a failed step's log that are shown once more at the end."""

app = typer.Typer(help="Compile pipelines and run them.", no_args_is_help=True)


class PipelineError(RuntimeError):
    """A pipeline that failed; the message names the step."""


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
) -> None:
    """Run a pipeline on this machine, each step in a process of its own."""
    parameters = {"variants": variants.split(",")} if variants else {}
    out = out or Path("runs") / name
    run(name, preset, overrides or [], out, **parameters, **({"seeds": seeds} if seeds else {}))
    show_results(name, out)


@app.command("compile", epilog=example("svip pipeline compile experiment --out experiment.yaml"))
def compile_command(
    name: Name, out: Annotated[Path, typer.Option("--out", "-o", help="The YAML file to write.")]
) -> None:
    """Write a pipeline as the YAML file that any Kubeflow Pipelines 2 server takes."""
    from kfp.compiler import Compiler

    pipeline = find_pipeline(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.stem}.part.yaml")  # the compiler looks at the suffix
    Compiler().compile(pipeline, str(part))
    part.replace(out)
    print(out)


def find_pipeline(name: str) -> Any:
    """The pipeline function; PipelineError for an unknown name."""
    if name not in PIPELINES:
        raise PipelineError(f"unknown pipeline {name!r}; there are: {', '.join(PIPELINES)}")
    return getattr(importlib.import_module(f"pipelines.{name}"), name)


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


def show_results(name: str, out: Path) -> None:
    """Print the accuracies, and where everything is."""
    if name == "ablation":
        print_table(out / "ablation.html")
    else:
        print_metrics(json.loads((out / "metrics.json").read_text()))
        for label, path in {"Report": "report.html", "Numbers": "metrics.json", "Checkpoint": "checkpoint"}.items():
            print(f"{label + ':':<12}{out / path}")
    uri = shown_uri()
    print(f"{'MLflow:':<12}{f'mlflow ui --backend-store-uri {shlex.quote(uri)}' if uri.startswith('sqlite') else uri}")


class StepLog(io.TextIOBase):
    """Takes all that kfp.local prints: to a file as it is, to the terminal without kfp's own chatter.

    ``step`` and ``tail`` are the step that runs and the last lines of its output; ``failed`` and ``failure`` those of
    the first one that failed.
    """

    STARTS = re.compile(r"Executing task '([^']+)'")
    FAILS = re.compile(r"Task '([^']+)' finished with status FAILURE")
    ENDS = re.compile(r"Task '[^']+' finished with status SUCCESS")  # its outputs follow
    INDENT = "    "
    LOGGER = re.compile(r"^ *\[KFP Executor [^\]]*\]: ")
    CHATTER = ("Looking for component", "Loading KFP component", "Wrote executor output file")
    EMPTY_BAR = re.compile(r": +0%\|")
    COLOUR = re.compile(r"\x1b\[\d+m")

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self.step = self.failed = ""
        self.failure: list[str] = []
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._terminal, self._file = terminal, file
        self._line = ""
        self._skips_until = ""
        self._running = False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(self.COLOUR.sub("", line))
        return len(text)

    def _take(self, line: str) -> None:
        self._file.write(f"{line}\n")  # not print(), which kfp has replaced by one that indents
        if started := self.STARTS.search(line):
            self.step, self._running = started[1], True
            self.tail.clear()
            self._show(f"== {self.step}")
        elif (failed := self.FAILS.search(line)) and not self.failed:
            self.failed, self.failure = failed[1], list(self.tail)
        elif self._skips_until:
            if line == self._skips_until:
                self._skips_until = ""
        elif line.endswith("Got executor_input:"):
            # a page of JSON; where steps run side by side, kfp indents their lines twice or thrice
            self._skips_until = f"{line[: len(line) - len(line.lstrip())]}}}"
        elif line.startswith(self.INDENT) and line.strip() and self._running:
            said = self.LOGGER.sub("", line.removeprefix(self.INDENT))
            if not said.lstrip().startswith(self.CHATTER) and not self.EMPTY_BAR.search(said):
                self.tail.append(said)
                self._show(f"   {said}")
        elif self.ENDS.search(line):
            self._running = False

    def _show(self, line: str) -> None:
        self._terminal.write(f"{line}\n")
        self._terminal.flush()


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
