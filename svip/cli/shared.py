"""What all commands share: the application, the options of several, tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def example(command: str) -> str:
    """The end of a help text; up to 78 columns stay one line in any terminal, and can be copied."""
    return f"Example:\n\n`{command}`"


app = typer.Typer(
    help="Zero-shot learning with semantically contextualized visual patches, as tracked and resumable steps.\n\n"
    "In order: prepare-data, embed-attributes, train, evaluate, report; `svip pipeline run` does them all.",
    epilog=example("svip pipeline run experiment --preset smoke --out runs/demo"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

Preset = Annotated[str, typer.Option("--preset", "-p", help="A shipped preset (`svip config --list`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the preset, such as `optim.lr=1e-5`.", show_default=False),
]
Bundle = Annotated[
    str, typer.Option("--bundle", help="Split bundle made by `svip prepare-data`: a folder, or its s3:// address.")
]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Folder that `svip train` wrote.")]
Vectors = Annotated[Path, typer.Option("--vectors", help="Folder that `svip embed-attributes` wrote.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, with seeds 0, 1, ...")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
Parent = Annotated[str, typer.Option("--parent-run-id", help="MLflow run to nest this one under.")]


@app.callback()
def set_up(
    debug: Annotated[bool, typer.Option("--debug", help="Log in detail; show the traceback of an error.")] = False,
) -> None:
    """What every command can be told."""
    if debug:
        logging.getLogger().setLevel(logging.DEBUG)


PARTS = {
    "bundle": ("bundle.json", "is not a split bundle", "make one with `svip prepare-data`"),
    "vectors": ("vectors.npy", "holds no attribute vectors", "make them with `svip embed-attributes`"),
    "checkpoint": ("model.json", "holds no finished training", "run `svip train --out` on it"),
    "evaluation": ("metrics.json", "holds no evaluation", "make one with `svip evaluate`"),
}
"""What a command starts from: a file that is always in such a folder, and what to say where it is not."""


def check_there(**places: str | Path) -> None:
    """Raises for the first folder that is not what it should be (see PARTS), and looks at nothing that is far away.

    Steps look closer, but only once PyTorch is loaded, and who has mistyped a name should not wait for that.
    """
    from svip.data.sources import is_remote

    for kind, place in places.items():
        file, problem, remedy = PARTS[kind]
        if is_remote(str(place)) or (Path(place) / file).is_file():
            continue
        missing = f"no {file}" if Path(place).is_dir() else "there is no such folder"
        raise ValueError(f"{place} {problem} ({missing}); {remedy}")


def check_files(files: Sequence[str | Path]) -> None:
    """Raises where some of the files are not there, and names these; at once, as ``check_there``."""
    if missing := [str(file) for file in files if not Path(file).is_file()]:
        raise FileNotFoundError(f"there is no file {', '.join(missing)}")


def quoted(text: str) -> str:
    """The value of an override that means just this text: YAML would read a folder 1.10 as a number."""
    return json.dumps(text, ensure_ascii=False)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The results table, as the report shows it."""
    from svip.evaluation.metrics import ACCURACIES
    from svip.evaluation.report import result_rows

    print("Accuracy in percent (mean of per-class top-1)")
    table = numbers_table(["method", "protocol"], [*ACCURACIES, "gamma"])
    for row in result_rows(metrics):
        table.add_row(row.method, row.note, *row.values, style="bold" if row.is_result else None)
    console.print(table)


def print_table(page: Path) -> None:
    """The table of a sweep, and where its files are."""
    print(page.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written to {page.parent}: {', '.join(sorted(file.name for file in page.parent.glob(f'{page.stem}.*')))}")


def numbers_table(labels: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table with columns of text, and of numbers set to the right."""
    table = Table(*labels)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
