"""The command line: ``svip STEP --help``. One command a step; it reads arguments and calls ``svip.steps``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
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
Bundle = Annotated[Path, typer.Option("--bundle", help="Split bundle made by `svip prepare-data`.")]
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


@app.command("prepare-data", epilog=example("svip prepare-data --dataset cub --root data --out bundle"))
def prepare_data(
    out: Out,
    dataset: Annotated[
        Literal["synthetic", "cub", "awa2", "sun"] | None,
        typer.Option(
            metavar="<name>", help="synthetic, cub, awa2 or sun; without it the preset's.", show_default=False
        ),
    ] = None,
    root: Annotated[str, typer.Option(help="Folder that holds the archives' content and xlsa17.")] = "",
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without missing photos.")] = False,
    preset: Annotated[
        str,
        typer.Option(
            "--preset", "-p", help="A shipped preset or a YAML file.", show_default="paper/DATASET; synthetic: smoke"
        ),
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Make a split bundle (packed images, tables, checksums) of a data set's original archives."""
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"data.dataset={dataset}"] if dataset else []
    chosen += [f"data.root={quoted(root)}"] if root else []
    chosen += ["data.allow_missing=true"] if allow_missing else []
    preset = preset or ("smoke" if dataset in (None, "synthetic") else f"paper/{dataset}")
    info = steps.prepare_data(str(out), preset, chosen)
    print(f"{info['dataset']}, {info['split']} split, fold {info['fold']}: {out}")
    table = numbers_table(["role"], ["images"])
    for role, count in info["counts"]["images"].items():
        table.add_row(role, f"{count:,}")
    console.print(table)


@app.command(
    "embed-attributes", epilog=example("svip embed-attributes --bundle bundle --vectors glove.6B.300d.txt --out words")
)
def embed_attributes(
    bundle: Bundle,
    out: Out,
    vectors: Annotated[
        str, typer.Option(help="Word vectors in GloVe's text format; synthetic data brings its own.")
    ] = "",
    preset: Preset = "smoke",
    overrides: Overrides = None,
) -> None:
    """Look up the word vectors of a bundle's attributes."""
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"semantics.vectors={quoted(vectors)}"] if vectors else []
    report = steps.embed_attributes(str(bundle), str(out), preset, chosen)
    missing = report["missing_words"]
    print(f"{len(report['attributes'])} attribute vectors in {out}; {len(missing)} words out of vocabulary")
    for word, suggestions in missing.items():
        print(f"  {word}: nearest known {', '.join(suggestions) or 'none'}")


@app.command(epilog=example("svip train -p paper/cub --bundle bundle --vectors words -o run optim.lr=1e-5"))
def train(
    bundle: Bundle,
    vectors: Vectors,
    out: Out,
    preset: Preset = "smoke",
    resume: Annotated[bool, typer.Option(help="Go on with what is in --out, bit for bit, or refuse to.")] = True,
    parent_run_id: Parent = "",
    overrides: Overrides = None,
) -> None:
    """Choose epoch and gamma on the validation classes, then train the model to keep on trainval."""
    from svip import steps

    result = steps.train(str(bundle), str(vectors), str(out), preset, overrides or [], parent_run_id, resume)
    print(f"trained: {out} (MLflow run {result['run_id']})")
    reached = [f"{name.removeprefix('val/')} {value:.1f}" for name, value in result.items() if name != "run_id"]
    if reached:
        print(f"on the validation classes: {', '.join(reached)}")


@app.command(
    "import-checkpoint",
    epilog=example("svip import-checkpoint cub.pth -p published/cub --word-vectors words -o run"),
)
def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' released checkpoint.", show_default=False)],
    preset: Preset,
    word_vectors: Annotated[
        Path,
        typer.Option("--word-vectors", help="Attribute vectors [A, V]: a .npy file, or `embed-attributes`' folder."),
    ],
    out: Out,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="The only split bundle to test it on.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Make a checkpoint of a file that the paper's authors released; nothing of the file is run."""
    from svip import steps

    arguments = (str(file), str(word_vectors), str(out), preset, overrides or [], str(bundle or ""))
    left_over = steps.import_checkpoint(*arguments)["imported"]["left_over"]
    print(f"imported: {out}" + (f" (not used: {', '.join(left_over)})" if left_over else ""))


@app.command(epilog=example("svip evaluate --checkpoint run --bundle bundle --out test"))
def evaluate(
    checkpoint: Checkpoint,
    bundle: Bundle,
    out: Out,
    parent_run_id: Parent = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="`evaluation.*`, `train.device`, `train.workers`.", show_default=False
        ),
    ] = None,
) -> None:
    """Evaluate a checkpoint: T1, U, S, H by each protocol, beside eszsl and chance."""
    from svip import steps

    print_metrics(steps.evaluate(str(checkpoint), str(bundle), str(out), parent_run_id, overrides=overrides or []))
    print(f"written to {out}: metrics.json, per_class.csv, curve.csv, predictions.npz")


@app.command(epilog=example("svip ablate --bundle bundle --vectors words -o ablation --seeds 3"))
def ablate(
    bundle: Bundle,
    vectors: Vectors,
    out: Out,
    preset: Preset = "smoke",
    variants: Annotated[
        str,
        typer.Option(help="all, or some of baseline, no_ssps, no_psc, no_jsd, no_w2p, no_p2a, full, with commas."),
    ] = "all",
    seeds: Seeds = 3,
    parent_run_id: Parent = "",
    overrides: Overrides = None,
) -> None:
    """Train and evaluate the variants of the paper's Table 2; goes on where it was stopped."""
    from svip import steps

    names = variants.split(",")
    page = steps.ablate(str(bundle), str(vectors), str(out), preset, names, seeds, overrides or [], parent_run_id)
    print_table(Path(page))


@app.command(epilog=example("svip sensitivity --bundle bundle --vectors words -o sweep --seeds 3"))
def sensitivity(
    bundle: Bundle,
    vectors: Vectors,
    out: Out,
    preset: Preset = "smoke",
    parameters: Annotated[str, typer.Option(help="all, or some of M, lambda1, lambda2, sigma, with commas.")] = "all",
    seeds: Seeds = 3,
    parent_run_id: Parent = "",
    overrides: Overrides = None,
) -> None:
    """Vary each parameter of the paper's Figure 4 by itself; goes on where it was stopped."""
    from svip import steps

    names = parameters.split(",")
    page = steps.sensitivity(str(bundle), str(vectors), str(out), preset, names, seeds, overrides or [], parent_run_id)
    print_table(Path(page))


@app.command(epilog=example("svip report --evaluation test --checkpoint run --bundle bundle --out report"))
def report(
    evaluation: Annotated[Path, typer.Option("--evaluation", help="Folder that `svip evaluate` wrote.")],
    checkpoint: Checkpoint,
    bundle: Bundle,
    out: Out,
    parent_run_id: Parent = "",
) -> None:
    """Make the HTML page and the Markdown table of an evaluation."""
    from svip import steps

    print(f"report: {steps.report(str(evaluation), str(checkpoint), str(bundle), str(out), parent_run_id)}")


@app.command(epilog=example("svip figures --checkpoint run --bundle bundle --baseline plain"))
def figures(
    checkpoint: Checkpoint,
    bundle: Bundle,
    baseline: Annotated[str, typer.Option(help="Checkpoint to stand beside it, such as a plain ViT's.")] = "",
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder to write to.", show_default="CHECKPOINT/figures")
    ] = "",
    images: Annotated[int, typer.Option(min=1, max=32, help="Images that figures 5 and 6 show.")] = 3,
    parent_run_id: Parent = "",
) -> None:
    """Draw the paper's figures 3, 5, 6 and 7 for a checkpoint, and a page with their captions."""
    from svip import steps

    print("\n".join(steps.figures(str(checkpoint), str(bundle), out, baseline, images, parent_run_id)))


@app.command(epilog=example("svip predict a.jpg b.jpg --checkpoint run --classes new.csv --out why"))
def predict(
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", help="Photos of any size.", show_default=False)
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="CSV of new classes (name, attributes) to choose among.", show_default="the checkpoint's"),
    ] = None,
    with_known: Annotated[bool, typer.Option("--with-known", help="New classes beside the checkpoint's own.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes shown of each image.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for overlays.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    template: Annotated[
        Path | None, typer.Option(help="Only write an empty CSV for --classes.", show_default=False)
    ] = None,
) -> None:
    """Say what is on photos, of known classes or of new ones, and which attributes and patches decided."""
    from svip import steps
    from svip.predict import write_template

    if template is not None:
        write_template(checkpoint, template)
        print(f"written: {template}; a line for each class, its name and the attributes as numbers")
        return
    if not images:
        raise typer.BadParameter("give at least one image (or --template)", param_hint="IMAGE")
    results = steps.predict(
        [str(image) for image in images], str(checkpoint), str(classes or ""), with_known, top, str(out or "")
    )
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print_prediction(result)


@app.command(epilog=example("svip config --preset paper/cub optim.lr=1e-5"))
def config(
    preset: Preset = "smoke",
    names: Annotated[bool, typer.Option("--list", help="List the shipped presets instead.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print a resolved configuration; this is what would run."""
    from svip.config import load_config, presets, to_yaml

    print("\n".join(presets()) if names else to_yaml(load_config(preset, overrides or [])), end="\n" if names else "")


@app.command(epilog=example("svip benchmark --preset smoke optim.batch_size=32"))
def benchmark(
    preset: Preset = "smoke",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5,
    overrides: Overrides = None,
) -> None:
    """Time a training step and inference against plain timm passes of the same backbone."""
    from svip.benchmark import compare

    table = numbers_table(["seconds a batch, median"], ["svip", "plain timm", "ratio"])
    for name, ours, plain in compare(preset, overrides or [], rounds):
        table.add_row(name, f"{ours:.4f}", f"{plain:.4f}", f"{ours / plain:.2f}")
    console.print(table)


def quoted(text: str) -> str:
    """The value of an override that means just this text: YAML would read a folder 1.10 as a number."""
    return json.dumps(text, ensure_ascii=False)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The results table, as the report shows it."""
    from svip.evaluation.report import result_rows

    print("Accuracy in percent (mean of per-class top-1)")
    table = numbers_table(["method", "protocol"], ["T1", "U", "S", "H", "gamma"])
    for row in result_rows(metrics):
        table.add_row(row.method, row.note, *row.values, style="bold" if row.is_result else None)
    console.print(table)


def print_table(page: Path) -> None:
    """The table of a sweep, and where its files are."""
    print(page.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written to {page.parent}: {', '.join(sorted(file.name for file in page.parent.glob(f'{page.stem}.*')))}")


def print_prediction(result: dict[str, Any]) -> None:
    """One image: its classes, and what decided for the first of them."""
    print(result["image"])
    table = numbers_table(["class"], ["score", "share, %"])
    for ranked in result["classes"]:
        table.add_row(escape(ranked["name"]), f"{ranked['score']:.3f}", f"{100 * ranked['share']:.1f}")
    reasons = numbers_table(["", "what decided for the first"], ["value", "row, column"])
    for number, reason in enumerate(result["classes"][0]["attributes"], 1):
        patch = "-" if reason["patch"] is None else "{}, {}".format(*reason["patch"])
        reasons.add_row(str(number), escape(reason["name"]), f"{reason['value']:.2f}", patch)
    console.print(table, reasons)
    if "overlay" in result:
        print(f"overlay: {result['overlay']}")


def numbers_table(labels: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table with columns of text, and of numbers set to the right."""
    table = Table(*labels)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


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
        message = escape(f"{type(error).__name__}: {error}")
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {message}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
