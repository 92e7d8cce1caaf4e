"""Commands that make the data ready: prepare-data, push-bundle, embed-attributes."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from svip.cli.shared import Bundle, Out, Overrides, Preset, app, console, example, numbers_table, quoted


@app.command("prepare-data", epilog=example("svip prepare-data --dataset cub --root data --out bundle"))
def prepare_data(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to, or s3://bucket/prefix.")],
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
    info = steps.prepare_data(out, preset, chosen)
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
    report = steps.embed_attributes(bundle, str(out), preset, chosen)
    missing = report["missing_words"]
    print(f"{len(report['attributes'])} attribute vectors in {out}; {len(missing)} words out of vocabulary")
    for word, suggestions in missing.items():
        print(f"  {word}: nearest known {', '.join(suggestions) or 'none'}")


@app.command("push-bundle", epilog=example("svip push-bundle --bundle bundle --to s3://team/bundles/cub"))
def push_bundle(
    bundle: Bundle, to: Annotated[str, typer.Option(help="Address to upload it to: s3://bucket/prefix.")]
) -> None:
    """Upload a split bundle, so that other machines can use its address as --bundle."""
    from svip import steps

    print(f"{to}: bundle {steps.push_bundle(bundle, to)[:12]}")
