"""The command line: ``svip STEP --help``. One command a step; it reads arguments and calls ``svip.steps``."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Zero-shot learning with semantically contextualized visual patches, as tracked and resumable steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

Preset = Annotated[str, typer.Option("--preset", "-p", help="A shipped preset (`svip config --list`) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as `optim.lr=1e-5`.")
]
Bundle = Annotated[Path, typer.Option("--bundle", help="Split bundle made by `svip prepare-data`.")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Folder that `svip train` wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
Parent = Annotated[str, typer.Option("--parent-run-id", help="MLflow run to nest this one under.")]


@app.command("prepare-data", epilog="Example: `svip prepare-data --dataset cub --root data --out bundles/cub`")
def prepare_data(
    out: Out,
    dataset: Annotated[str, typer.Option(help="synthetic, cub, awa2 or sun; empty: the preset's.")] = "",
    root: Annotated[str, typer.Option(help="Folder that holds the archives' content and xlsa17.")] = "",
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without the photos not there.")] = False,
    preset: Preset = "",
    overrides: Overrides = None,
) -> None:
    """Make a split bundle (packed images, tables, checksums) of a data set's original archives."""
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"data.dataset={dataset}"] if dataset else []
    chosen += [f"data.root={root}"] if root else []
    chosen += ["data.allow_missing=true"] if allow_missing else []
    preset = preset or ("smoke" if dataset in ("", "synthetic") else f"paper/{dataset}")
    info = steps.prepare_data(str(out), preset, chosen)
    table = Table("role", "images", title=f"{info['dataset']}, {info['split']} split, fold {info['fold']}: {out}")
    for role, count in info["counts"]["images"].items():
        table.add_row(role, str(count))
    console.print(table)


@app.command(
    "embed-attributes",
    epilog="Example: `svip embed-attributes --bundle bundles/cub --vectors glove.6B.300d.txt --out vectors/cub`",
)
def embed_attributes(
    bundle: Bundle,
    out: Out,
    vectors: Annotated[str, typer.Option(help="Word vectors in GloVe's text format.")] = "",
    preset: Preset = "smoke",
    overrides: Overrides = None,
) -> None:
    """Look up the word vectors of a bundle's attributes."""
    from svip import steps

    report = steps.embed_attributes(
        str(bundle), str(out), preset, [*(overrides or []), *([f"semantics.vectors={vectors}"] if vectors else [])]
    )
    missing = report["missing_words"]
    console.print(f"{len(report['attributes'])} attribute vectors in {out}; {len(missing)} words out of vocabulary")
    for word, suggestions in missing.items():
        console.print(f"  {word}: nearest known {', '.join(suggestions) or 'none'}")


@app.command(epilog="Example: `svip train --bundle b --vectors v --out runs/cub --preset paper/cub optim.lr=1e-5`")
def train(
    bundle: Bundle,
    vectors: Annotated[Path, typer.Option("--vectors", help="Folder that `svip embed-attributes` wrote.")],
    out: Out,
    preset: Preset = "smoke",
    resume: Annotated[bool, typer.Option(help="Go on with what is in --out, bit for bit.")] = True,
    parent_run_id: Parent = "",
    overrides: Overrides = None,
) -> None:
    """Choose epoch and gamma on the validation classes, then train the model to keep on trainval."""
    from svip import steps

    result = steps.train(str(bundle), str(vectors), str(out), preset, overrides or [], parent_run_id, resume)
    shown = {name: f"{value:.1f}" for name, value in result.items() if isinstance(value, float)}
    console.print(f"trained: {out}  (MLflow run {result['run_id']})", *(f"{k} {v}" for k, v in shown.items()))


@app.command(epilog="Example: `svip evaluate --checkpoint runs/cub --bundle bundles/cub --out runs/cub/evaluation`")
def evaluate(checkpoint: Checkpoint, bundle: Bundle, out: Out, parent_run_id: Parent = "") -> None:
    """Evaluate a checkpoint: T1, U, S, H by each protocol, beside eszsl and chance."""
    from svip import steps

    print_metrics(steps.evaluate(str(checkpoint), str(bundle), str(out), parent_run_id))
    console.print(f"written to {out}: metrics.json, per_class.csv, curve.csv, predictions.npz")


@app.command(epilog="Example: `svip report --evaluation e --checkpoint runs/cub --bundle bundles/cub --out report`")
def report(
    evaluation: Annotated[Path, typer.Option("--evaluation", help="Folder that `svip evaluate` wrote.")],
    checkpoint: Checkpoint,
    bundle: Bundle,
    out: Out,
    parent_run_id: Parent = "",
) -> None:
    """Make the HTML page and the Markdown table of an evaluation."""
    from svip import steps

    console.print(f"report: {steps.report(str(evaluation), str(checkpoint), str(bundle), str(out), parent_run_id)}")


@app.command(epilog="Example: `svip config --preset paper/cub optim.lr=1e-5`")
def config(
    preset: Preset = "smoke",
    names: Annotated[bool, typer.Option("--list", help="List the shipped presets instead.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print a resolved configuration; this is what would run."""
    from svip.config import load_config, presets, to_yaml

    print("\n".join(presets()) if names else to_yaml(load_config(preset, overrides or [])), end="\n" if names else "")


@app.command(epilog="Example: `svip benchmark --preset smoke optim.batch_size=32`")
def benchmark(
    preset: Preset = "smoke",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5,
    overrides: Overrides = None,
) -> None:
    """Time a training step and inference against plain timm passes of the same backbone."""
    from svip.benchmark import compare

    table = Table("", "svip", "plain timm", "ratio", title="seconds a batch, median")
    for name, ours, plain in compare(preset, overrides or [], rounds):
        table.add_row(name, f"{ours:.4f}", f"{plain:.4f}", f"{ours / plain:.2f}")
    console.print(table)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The results table, as the report shows it."""
    from svip import steps

    table = Table("method", "protocol", "T1", "U", "S", "H", "gamma", title="mean of per-class top-1, percent")
    for row in steps.summary(metrics):
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Run the command line; expected errors end with one line and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "alembic", "mlflow", "httpx", "gensim", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for extension in entry_points(group="svip.commands"):
        app.add_typer(extension.load(), name=extension.name)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: {error}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
