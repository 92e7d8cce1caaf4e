"""Commands that make the data ready: fetch, mirror, prepare-data, push-bundle, embed-attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svip.cli.shared import Bundle, Out, Overrides, Preset, app, console, example, numbers_table, quoted

Package = Annotated[
    str,
    typer.Argument(metavar="NAME", help="cub, awa2, sun, apy; all; xlsa17; glove.6B, glove.840B.", show_default=False),
]
FetchRoot = Annotated[Path, typer.Option("--root", help="Folder for the archives and what they hold.")]


@app.command(
    "fetch",
    epilog=example("svip fetch cub --root data --mirror s3://team/zsl"),
)
def fetch(
    name: Package,
    root: FetchRoot,
    mirror: Annotated[
        str, typer.Option(help="web: the owners' addresses; or an s3:// address, URL or folder of `svip mirror`.")
    ] = "web",
    discard_archives: Annotated[
        bool, typer.Option("--discard-archives", help="Remove each archive once it is unpacked.")
    ] = False,
) -> None:
    """Download, check and unpack a data set or word vectors; what was interrupted goes on where it was."""
    from svip.data import fetch as fetching  # not by svip.steps, which loads PyTorch first

    table = numbers_table(["archive", "unpacked to", "sha256"], ["bytes"])
    for there in fetching.fetch(name, root, mirror, discard_archives=discard_archives):
        known = there.record
        place = str(root / there.archive.folder) if there.archive.holds else str(root / "archives")
        table.add_row(
            there.archive.name, place, known.sha256[:12] if known else "not checked", f"{known.size:,}" if known else ""
        )
    console.print(table)


@app.command("mirror", epilog=example("svip mirror cub --root data --to s3://team/zsl"))
def mirror(
    name: Package,
    to: Annotated[str, typer.Option(help="s3://bucket/prefix or a folder.")],
    root: FetchRoot,
) -> None:
    """Copy fetched archives, with their checksums, to a bucket or folder, so that a team downloads once."""
    from svip.data import fetch as fetching

    copied = fetching.mirror(name, root, to)
    print(f"copied to {to}: {', '.join(copied) or 'nothing, all of it is there'}")
    print(f"fetch from there: svip fetch {name} --root DIR --mirror {to}")


@app.command(
    "prepare-data",
    epilog=example("svip prepare-data --dataset cub --root data --mirror web --out bundle"),
)
def prepare_data(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write to, or s3://bucket/prefix.")],
    dataset: Annotated[
        Literal["synthetic", "cub", "awa2", "sun"] | None,
        typer.Option(
            metavar="<name>", help="synthetic, cub, awa2 or sun; without it the preset's.", show_default=False
        ),
    ] = None,
    root: Annotated[str, typer.Option(help="Folder that holds the archives' content and xlsa17.")] = "",
    mirror: Annotated[
        str,
        typer.Option(
            help="Fetch what is missing below the root: web, or a mirror (see `svip fetch --help`).", show_default=False
        ),
    ] = "",
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
    chosen += [f"data.mirror={quoted(mirror)}"] if mirror else []
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
