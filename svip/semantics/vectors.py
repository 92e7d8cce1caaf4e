"""Attribute vectors [A, V]: the pooled word vectors of each attribute's words, and the report of what was not found."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gensim.models import KeyedVectors
from numpy.typing import NDArray

from svip.data.sources import is_remote
from svip.data.transfer import read_bytes
from svip.semantics.scan import VectorsError
from svip.semantics.sources import read_words

FILES = ("vectors.npy", "attributes.txt", "report.json")
"""What write_embedding writes."""


@dataclass(frozen=True)
class Embedding:
    """Attribute vectors and how they came about."""

    vectors: NDArray[np.float32]
    """[A, V]"""
    names: list[str]
    """The A attribute names."""
    report: dict[str, Any]
    """vectors_file, dimension, pooling; attributes: per attribute its words used and missing; missing_words: word out
    of vocabulary -> the nearest words known; zero_attributes: names without any known word."""


def vectors_sha256(vectors: NDArray[np.float32]) -> str:
    """What tells attribute vectors apart: in a training's folder, its run, and the names of their copies."""
    return hashlib.sha256(vectors.tobytes()).hexdigest()


def embed_attributes(
    phrases: Sequence[Sequence[str]],
    names: Sequence[str],
    source: KeyedVectors | Path | str,
    pooling: str = "mean",
    allow_missing: bool = False,
) -> Embedding:
    """Look up the words of each attribute in word vectors and pool them to vectors [A, V].

    source: what ``read_words`` takes. Words out of vocabulary are reported and left out. An attribute without any known
    word raises VectorsError with suggestions or, with ``allow_missing``, gets a zero vector that the report lists.
    """
    if pooling not in ("mean", "sum"):
        raise ValueError(f"pooling={pooling!r}: expected mean or sum")
    if len(phrases) != len(names):
        raise ValueError(f"{len(phrases)} phrases for {len(names)} attribute names: expected as many")
    wanted = {word for phrase in phrases for word in phrase}
    known, common, source_name = read_words(source, wanted)
    rank = {word: place for place, word in enumerate(common)}
    missing = {word: _suggestions(word, rank) for word in sorted(wanted) if word not in known}
    vectors = np.zeros((len(names), known.vector_size), np.float32)
    attributes, zero = [], []
    for index, (name, phrase) in enumerate(zip(names, phrases, strict=True)):
        used = [word for word in phrase if word in known]
        attributes.append({"name": name, "words": used, "missing": [word for word in phrase if word not in known]})
        if used:
            vectors[index] = known[used].mean(0) if pooling == "mean" else known[used].sum(0)
        elif allow_missing:
            zero.append(name)
        else:
            hints = "; ".join(f"{word!r}, nearest known: {', '.join(missing[word]) or 'none'}" for word in phrase)
            raise VectorsError(
                f"{source_name} knows no word of attribute {name!r} ({hints}); use another file, give the attribute "
                "other words (semantics.phrases), or set semantics.allow_missing=true for a zero vector"
            )
    report = {
        "vectors_file": Path(source_name).name,
        "dimension": known.vector_size,
        "pooling": pooling,
        "attributes": attributes,
        "missing_words": missing,
        "zero_attributes": zero,
    }
    return Embedding(vectors, list(names), report)


def write_embedding(embedding: Embedding, out: Path | str) -> None:
    """Write vectors.npy, attributes.txt and the report (.json, .md) to the folder ``out``.

    It appears whole or not at all. The same attributes' vectors by the same file and pooling are replaced; VectorsError
    when something else is there.
    """
    out = Path(out).resolve()
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not (out / "vectors.npy").is_file():
        raise VectorsError(f"{out} exists and holds no attribute vectors; give another output folder")
    if occupied:
        _check_same(out, embedding)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "vectors.npy", embedding.vectors, allow_pickle=False)
        (temporary / "attributes.txt").write_text("\n".join(embedding.names) + "\n", encoding="utf-8")
        (temporary / "report.json").write_text(json.dumps(embedding.report, indent=2) + "\n", encoding="utf-8")
        if embedding.report:  # vectors made by hand have none
            (temporary / "report.md").write_text(_markdown(embedding), encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_same(out: Path, embedding: Embedding) -> None:
    """VectorsError where ``out`` holds whole vectors of other attributes, or made in another way."""
    try:
        there = read_embedding(out)
    except VectorsError:
        return
    file, pooling = (there.report.get(key) for key in ("vectors_file", "pooling"))
    if (there.names, file, pooling) != (embedding.names, *map(embedding.report.get, ("vectors_file", "pooling"))):
        raise VectorsError(
            f"{out} holds other attribute vectors ({len(there.names)} from {file}, pooling {pooling}); give another "
            "--out, or delete it first"
        )


def read_embedding(path: Path | str) -> Embedding:
    """Open what write_embedding wrote; VectorsError when it is not whole or its parts don't fit."""
    path = Path(path)
    try:
        vectors = np.load(path / "vectors.npy", allow_pickle=False)
        names = (path / "attributes.txt").read_text(encoding="utf-8").splitlines()
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except Exception as error:  # also broken JSON; and numpy raises many types for a damaged header
        raise VectorsError(
            f"{path} holds no attribute vectors ({error}); make them with `svip embed-attributes`"
        ) from error
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(names):
        raise VectorsError(
            f"{path / 'vectors.npy'}: expected float32 [{len(names)}, V] for the names in attributes.txt, "
            f"found {vectors.dtype} {list(vectors.shape)}; embed the attributes again"
        )
    return Embedding(vectors, names, report)


def open_embedding(address: Path | str) -> Embedding:
    """``read_embedding`` of a folder, or of what lies at an s3:// or http(s):// address."""
    if not is_remote(str(address)):
        return read_embedding(address)
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            (Path(folder) / name).write_bytes(read_bytes(f"{str(address).rstrip('/')}/{name}"))
        return read_embedding(folder)


def read_vectors(path: Path | str) -> NDArray[np.float32]:
    """Attribute vectors [A, V] in a folder of write_embedding or a .npy file; VectorsError when they can't be used."""
    if Path(path).is_dir():
        return read_embedding(path).vectors
    expected = "expected finite floats [A, V] in a .npy file, or the folder that `svip embed-attributes` wrote"
    try:
        vectors = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header
        raise VectorsError(f"{path} holds no attribute vectors ({error}); {expected}") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f" or vectors.ndim != 2:
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "several arrays"
        raise VectorsError(f"{path}: {expected}; found {found}")
    if not np.isfinite(vectors).all():
        raise VectorsError(f"{path}: {expected}; found some that are not finite")
    return vectors.astype(np.float32)


def _suggestions(word: str, common: dict[str, int]) -> list[str]:
    """What may be meant by an unknown word: two words glued into one, then words spelt alike; at most three."""
    parts = [(word[:at], word[at:]) for at in range(3, len(word) - 2)]
    glued = [(max(common[one], common[two]), f"{one} {two}") for one, two in parts if one in common and two in common]
    # difflib is slow: offer it only words that begin alike and are about as long
    near = [other for other in common if other[:1] == word[:1] and abs(len(other) - len(word)) <= 3]
    return [text for _, text in sorted(glued)[:1]] + difflib.get_close_matches(word, near, n=2, cutoff=0.7)


def _markdown(embedding: Embedding) -> str:
    """The report for people: what was looked up, and what was not found."""
    report, (count, size) = embedding.report, embedding.vectors.shape
    lines = [
        f"# {count} attribute vectors of size {size}",
        "",
        f"From `{report['vectors_file']}`; an attribute's vector is the {report['pooling']} of those of its words.",
        "",
    ]
    if missing := report["missing_words"]:
        lines += ["| word without a vector | words like it that have one |", "|---|---|"]
        lines += [f"| {word} | {', '.join(near)} |" for word, near in missing.items()]
    else:
        lines.append("Every word has a vector.")
    if zero := report["zero_attributes"]:
        lines += ["", f"No word of these attributes has one, so that their vectors are zero: {', '.join(zero)}."]
    return "\n".join(lines) + "\n"
