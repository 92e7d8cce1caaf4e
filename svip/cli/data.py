"""Commands that make the data ready: datasets, fetch, mirror, prepare-data, push-bundle, embed-attributes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from svip.cli.shared import Bundle, Out, Overrides, Preset, app, check_there, console, example, numbers_table, quoted

log = logging.getLogger(__name__)

Package = Annotated[
    str,
    typer.Argument(metavar="NAME", help="cub, awa2, sun, apy; all; xlsa17; glove.6B, glove.840B.", show_default=False),
]
FetchRoot = Annotated[Path, typer.Option("--root", help="Folder for the archives and what they hold.")]


@app.command(epilog=example("svip datasets --root data"))
def datasets(
    root: Annotated[Path, typer.Option(help="Folder to look into for what is there already.")] = Path("data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the data sets and word vectors that can be fetched, and what of them is there."""
    from svip.data.inventory import inventory

    if not root.is_dir():
        log.warning("%s does not exist: nothing is there yet", root)
    packages = inventory(root)
    if as_json:
        print(json.dumps(packages, indent=2))
        return
    sets = numbers_table(["data set"], ["images", "seen + unseen classes", "attributes"])
    sets.add_column(f"under {root}")
    archives = numbers_table(["NAME", "archive"], ["size"])
    archives.add_column(f"under {root}")
    for column in archives.columns[:2]:  # what is to be copied is never cut
        column.no_wrap = True
    for package in packages:
        if "images" in package:
            seen = f"{package['seen_classes']} + {package['unseen_classes']}"
            sets.add_row(package["name"], f"{package['images']:,}", seen, str(package["attributes"]), _found(package))
        for archive in package["archives"]:
            if len(package["archives"]) > 1 and archive["name"] == "xlsa17.zip":
                continue  # of all data sets, and a package of its own
            state = package["here"]["archives"][archive["name"]]
            archives.add_row(package["name"], archive["name"], _gigabytes(archive["size"]), state)
    console.print(sets, archives)
    print(f"`svip fetch NAME --root {root}` gets what is missing; --json adds licences, addresses and citations")


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
    again: Annotated[
        bool, typer.Option("--again", help="Unpack what is there already anew: photos are missing, or were changed.")
    ] = False,
) -> None:
    """Download, check and unpack a data set or word vectors; what was interrupted goes on where it was."""
    from svip.data import fetch as fetching  # not by svip.steps, which loads PyTorch first

    table = numbers_table(["archive", "unpacked to", "sha256"], ["bytes"])
    for there in fetching.fetch(name, root, mirror, discard_archives=discard_archives, again=again):
        known = there.record
        place = str(root / there.archive.folder) if there.archive.holds else str(root / "archives")
        table.add_row(
            there.archive.name,
            place,
            known.sha256[:12] if known else "found, not checked",
            f"{known.size:,}" if known else "",
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
        Literal["synthetic", "cub", "awa2", "sun", "apy", "custom"] | None,
        typer.Option(
            metavar="<name>",
            help="synthetic, cub, awa2, sun, apy or custom (your own: docs/own-data.md); without it the preset's.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[str, typer.Option(help="Folder that holds the archives' content and xlsa17.")] = "",
    mirror: Annotated[
        str,
        typer.Option(
            help="Fetch what is missing below the root: web, or a mirror (see `svip fetch --help`).", show_default=False
        ),
    ] = "",
    images: Annotated[str, typer.Option(help="custom: table of the images (CSV or Parquet).")] = "",
    attributes: Annotated[str, typer.Option(help="custom: table of the classes and their attributes.")] = "",
    like: Annotated[
        Literal["cub", "awa2", "sun"] | None,
        typer.Option(metavar="<name>", help="synthetic: as large as cub, awa2 or sun, for load tests."),
    ] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on without missing photos.")] = False,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            "-p",
            help="A shipped preset or a YAML file.",
            show_default="paper/DATASET; apy, custom: paper/cub",
        ),
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Make a split bundle (packed images, tables, checksums) of a data set's original archives, or of your own."""
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"data.dataset={dataset}"] if dataset else []
    options = {"root": root, "mirror": mirror, "images": images, "attributes": attributes, "like": like}
    chosen += [f"data.{name}={quoted(value)}" for name, value in options.items() if value]
    chosen += ["data.allow_missing=true"] if allow_missing else []
    preset = preset or _usual_preset(dataset, like)
    info = steps.prepare_data(out, preset, chosen)
    print(f"{info['dataset']}, {info['split']} split, fold {info['fold']}: {out}")
    table = numbers_table(["role"], ["images"])
    for role, count in info["counts"]["images"].items():
        table.add_row(role, f"{count:,}")
    console.print(table)
    if missing := info["counts"]["missing"]:
        print(f"{missing:,} listed photos are missing: {_first(info['missing'], missing)}")
    if dropped := info.get("dropped_classes"):
        print(f"{len(dropped):,} classes are left out for having none: {_first(dropped, len(dropped))}")


@app.command(
    "embed-attributes", epilog=example("svip embed-attributes --bundle bundle --vectors glove.6B.300d.txt --out words")
)
def embed_attributes(
    bundle: Bundle,
    out: Out,
    vectors: Annotated[
        str,
        typer.Option(
            metavar="<file, address or name>", help="Word vectors (see above); synthetic data brings its own."
        ),
    ] = "",
    preset: Preset = "smoke",
    overrides: Overrides = None,
) -> None:
    """Look up the word vectors of a bundle's attributes.

    `--vectors` takes what there is, as it was downloaded:

    - GloVe or word2vec text: `glove.6B.300d.txt`, `vectors.txt.gz`
    - one file of a zip: `glove.6B.zip::glove.6B.300d.txt`
    - word2vec's binary form: `GoogleNews-vectors-negative300.bin.gz`
    - what gensim saved: `vectors.kv`, `word2vec.model`
    - a name of gensim-data: `word2vec-google-news-300`
    - an address: `s3://bucket/glove.6B.300d.txt`, `https://...`
    """
    check_there(bundle=bundle)
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"semantics.vectors={quoted(vectors)}"] if vectors else []
    report = steps.embed_attributes(bundle, str(out), preset, chosen)
    missing = report["missing_words"]
    print(f"{len(report['attributes'])} attribute vectors in {out}; {len(missing)} words out of vocabulary")
    if missing:
        table = Table("attribute", "known words", "unknown words, nearest known")
        for item in report["attributes"]:
            unknown = [f"{word} ({', '.join(missing[word]) or 'none'})" for word in item["missing"]]
            if unknown:
                table.add_row(escape(item["name"]), " ".join(item["words"]) or "none", ", ".join(unknown))
        console.print(table)


@app.command("push-bundle", epilog=example("svip push-bundle --bundle bundle --to s3://team/bundles/cub"))
def push_bundle(
    bundle: Bundle, to: Annotated[str, typer.Option(help="Address to upload it to: s3://bucket/prefix.")]
) -> None:
    """Upload a split bundle, so that other machines can use its address as --bundle."""
    check_there(bundle=bundle)
    from svip import steps

    print(f"{to}: bundle {steps.push_bundle(bundle, to)[:12]}")


def _usual_preset(dataset: str | None, like: str | None) -> str:
    """The paper's for the data set, or for the one of its size; CUB's for those that the paper has not."""
    if dataset in (None, "synthetic"):
        return f"paper/{like}" if like else "smoke"
    return "paper/cub" if dataset in ("apy", "custom") else f"paper/{dataset}"


def _first(names: Sequence[str], count: int, shown: int = 5) -> str:
    """The first of ``count`` names; bundle.json has more of them."""
    return ", ".join(names[:shown]) + (", ... (bundle.json names more)" if count > shown else "")


def _found(package: dict[str, Any]) -> str:
    """What of a data set is there."""
    photos, version = package["here"]["photos"], package["here"]["proposed_split"]
    return f"{photos:,} photos, {f'Proposed Split v{version}' if version else 'no splits'}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"
