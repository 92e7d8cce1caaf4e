"""Commands that make the data ready: prepare-data, embed-attributes."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from svip.cli.shared import Bundle, Out, Overrides, Preset, app, console, example, numbers_table, quoted


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
    from svip import steps

    chosen = list(overrides or [])
    chosen += [f"semantics.vectors={quoted(vectors)}"] if vectors else []
    report = steps.embed_attributes(str(bundle), str(out), preset, chosen)
    missing = report["missing_words"]
    print(f"{len(report['attributes'])} attribute vectors in {out}; {len(missing)} words out of vocabulary")
    if missing:
        table = Table("attribute", "known words", "unknown words, nearest known")
        for item in report["attributes"]:
            unknown = [f"{word} ({', '.join(missing[word]) or 'none'})" for word in item["missing"]]
            if unknown:
                table.add_row(escape(item["name"]), " ".join(item["words"]) or "none", ", ".join(unknown))
        console.print(table)
