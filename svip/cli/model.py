"""Commands that make models, and those that look at them: train ... benchmark."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from svip.cli.shared import (
    Bundle,
    Checkpoint,
    Out,
    Overrides,
    Parent,
    Preset,
    Seeds,
    Vectors,
    app,
    check_files,
    check_there,
    console,
    example,
    numbers_table,
    print_metrics,
    print_table,
)
from svip.config import load_config, presets, to_yaml


@app.command(epilog=example("svip train -p paper/cub --bundle bundle --vectors words -o run optim.lr=1e-5"))
def train(
    bundle: Bundle,
    vectors: Annotated[str, typer.Option(help="Folder that `svip embed-attributes` wrote, or its s3:// address.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to, or an s3:// address to keep it at.")],
    preset: Preset = "smoke",
    resume: Annotated[bool, typer.Option(help="Go on with what is in --out, bit for bit, or refuse to.")] = True,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes of each machine.", show_default="$SVIP_PROCESSES, else one a GPU")
    ] = 0,
    nodes: Annotated[
        int,
        typer.Option(
            min=0, help="Machines: more than one are a Kubeflow TrainJob.", show_default="$SVIP_NODES, else 1"
        ),
    ] = 0,
    run: Annotated[str, typer.Option(help="A run of the ablation, such as `no_psc:1`.")] = "",
    log_model: Annotated[bool, typer.Option(help="Store the trained model in MLflow too.")] = True,
    parent_run_id: Parent = "",
    overrides: Overrides = None,
) -> None:
    """Choose epoch and gamma on the validation classes, then train the model to keep on trainval."""
    load_config(preset, overrides or [])
    if nodes < 2 and "SVIP_NODES" not in os.environ:  # machines of a cluster may have what is not here
        check_there(bundle=bundle, vectors=vectors)
    from svip import steps
    from svip.training.distributed import speaks

    result = steps.train(
        bundle, vectors, out, preset, overrides or [], parent_run_id, resume, run, log_model, processes, nodes
    )
    if not speaks():
        return
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
        str, typer.Option("--bundle", help="The only split bundle to test it on.", show_default=False)
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Make a checkpoint of a file that the paper's authors released; nothing of the file is run."""
    check_files([file])
    from svip import steps

    arguments = (str(file), str(word_vectors), str(out), preset, overrides or [], bundle)
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
    check_there(checkpoint=checkpoint, bundle=bundle)
    from svip import steps
    from svip.training.distributed import speaks

    metrics = steps.evaluate(str(checkpoint), bundle, str(out), parent_run_id, overrides=overrides or [])
    if speaks():
        print_metrics(metrics)
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
    load_config(preset, overrides or [])
    check_there(bundle=bundle, vectors=vectors)
    from svip import steps

    names = variants.split(",")
    page = steps.ablate(bundle, str(vectors), str(out), preset, names, seeds, overrides or [], parent_run_id)
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
    load_config(preset, overrides or [])
    check_there(bundle=bundle, vectors=vectors)
    from svip import steps

    names = parameters.split(",")
    page = steps.sensitivity(bundle, str(vectors), str(out), preset, names, seeds, overrides or [], parent_run_id)
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
    check_there(evaluation=evaluation, checkpoint=checkpoint, bundle=bundle)
    from svip import steps

    print(f"report: {steps.report(str(evaluation), str(checkpoint), bundle, str(out), parent_run_id)}")


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
    check_there(checkpoint=checkpoint, bundle=bundle)
    if baseline:
        check_there(checkpoint=baseline)
    from svip import steps

    print("\n".join(steps.figures(str(checkpoint), bundle, out, baseline, images, parent_run_id)))


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
    if template is not None:
        if images:
            raise typer.BadParameter("writes a CSV alone; leave out the images", param_hint="--template")
        check_there(checkpoint=checkpoint)
        from svip.predict import write_template

        write_template(checkpoint, template)
        print(f"written: {template}; a line for each class, its name and the attributes as numbers")
        return
    if with_known and classes is None:
        raise typer.BadParameter(
            "needs new classes (--classes) to stand beside the known ones", param_hint="--with-known"
        )
    if not images:
        raise typer.BadParameter("give at least one image (or --template)", param_hint="IMAGE")
    check_files([*images, *([classes] if classes else [])])
    check_there(checkpoint=checkpoint)
    from svip import steps

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
