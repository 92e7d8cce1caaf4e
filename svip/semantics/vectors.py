"""Attribute vectors [A, V]: the pooled word vectors of each attribute's words, and the report of what was not found."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gensim.models import KeyedVectors
from numpy.typing import NDArray

from svip.data.bundle import DataError

SUGGESTED_FROM = 100_000
"""Suggestions for unknown words come from this many first words of the file (GloVe's order is by frequency)."""


class VectorsError(DataError):
    """Word or attribute vectors that can't be used; the message names the file, and the line or the attribute."""


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


def embed_attributes(
    phrases: Sequence[Sequence[str]],
    names: Sequence[str],
    vectors_file: Path | str,
    pooling: str = "mean",
    allow_missing: bool = False,
) -> Embedding:
    """Look up the words of each attribute in a GloVe (or word2vec) text file and pool them to vectors [A, V].

    Words out of vocabulary are reported and left out. An attribute without any known word raises VectorsError with
    suggestions or, with ``allow_missing``, gets a zero vector that the report lists.
    """
    if pooling not in ("mean", "sum"):
        raise ValueError(f"pooling={pooling!r}: expected mean or sum")
    if len(phrases) != len(names):
        raise ValueError(f"{len(phrases)} phrases for {len(names)} attribute names: expected as many")
    wanted = {word for phrase in phrases for word in phrase}
    known, common = read_words(vectors_file, wanted)
    missing = {word: _suggestions(word, common) for word in sorted(wanted) if word not in known}
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
                f"{vectors_file} knows no word of attribute {name!r} ({hints}); use another file, give the attribute "
                "other words in svip/semantics/attributes.py, or set semantics.allow_missing=true for a zero vector"
            )
    report = {
        "vectors_file": Path(vectors_file).name,
        "dimension": known.vector_size,
        "pooling": pooling,
        "attributes": attributes,
        "missing_words": missing,
        "zero_attributes": zero,
    }
    return Embedding(vectors, list(names), report)


def read_words(path: Path | str, wanted: set[str]) -> tuple[KeyedVectors, list[str]]:
    """The vectors of the wanted words that a GloVe text file has, and its commonest words.

    One scan that parses only the lines it keeps: gensim's own reader parses all, which takes minutes where this takes
    a second. word2vec's header line is accepted. VectorsError names file and line of what can't be read.
    """
    keys = {word.encode(): word for word in wanted}
    rows: dict[str, NDArray[np.float32]] = {}
    common: list[str] = []
    dimension = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                token, _, numbers = line.partition(b" ")
                if number <= 2 and (b"\0" in line or line.startswith(b"\x1f\x8b")):  # packed, or word2vec's binary form
                    raise VectorsError(f"{path} is not text; expected unpacked GloVe text: a word and its numbers")
                if number == 1 and len(line.split()) == 2 and line.replace(b" ", b"").strip().isdigit():
                    dimension = int(numbers)  # word2vec's header: words, numbers a word
                    continue
                if not dimension:
                    dimension = len(numbers.split())
                    if not dimension:
                        raise VectorsError(f"{path}, line {number}: expected a word and its numbers")
                if number <= SUGGESTED_FROM:
                    common.append(token.decode(errors="replace"))
                word = keys.get(token)
                if word is not None and word not in rows:
                    vector = _parse(numbers, dimension, f"{path}, line {number}")
                    if vector is not None:
                        rows[word] = vector
    except OSError as error:
        raise VectorsError(f"can't read word vectors {path}: {error.strerror}; check semantics.vectors") from error
    if not dimension or not common:
        raise VectorsError(f"{path} holds no word vectors; expected GloVe text: a word and its numbers on each line")
    known = KeyedVectors(dimension, count=0, dtype=np.float32)
    if rows:
        known.add_vectors(list(rows), np.stack(list(rows.values())))
    return known, common


def write_embedding(embedding: Embedding, out: Path | str) -> None:
    """Write vectors.npy, attributes.txt and report.json to the folder ``out``, which appears whole or not at all.

    An older embedding there is replaced; VectorsError when something else is there.
    """
    out = Path(out).resolve()
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not (out / "vectors.npy").is_file():
        raise VectorsError(f"{out} exists and holds no attribute vectors; give another output folder")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "vectors.npy", embedding.vectors, allow_pickle=False)
        (temporary / "attributes.txt").write_text("\n".join(embedding.names) + "\n", encoding="utf-8")
        (temporary / "report.json").write_text(json.dumps(embedding.report, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_embedding(path: Path | str) -> Embedding:
    """Open what write_embedding wrote; VectorsError when it is not whole or its parts don't fit."""
    path = Path(path)
    try:
        vectors = np.load(path / "vectors.npy", allow_pickle=False)
        names = (path / "attributes.txt").read_text(encoding="utf-8").splitlines()
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # also broken JSON, and pickles in vectors.npy
        raise VectorsError(
            f"{path} holds no attribute vectors ({error}); make them with `svip embed-attributes`"
        ) from error
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(names):
        raise VectorsError(
            f"{path / 'vectors.npy'}: expected float32 [{len(names)}, V] for the names in attributes.txt, "
            f"found {vectors.dtype} {list(vectors.shape)}; embed the attributes again"
        )
    return Embedding(vectors, names, report)


def read_vectors(path: Path | str) -> NDArray[np.float32]:
    """Attribute vectors [A, V] in a folder of write_embedding or a .npy file; VectorsError when they can't be used."""
    if Path(path).is_dir():
        return read_embedding(path).vectors
    expected = "expected finite floats [A, V] in a .npy file, or the folder that `svip embed-attributes` wrote"
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VectorsError(f"{path} holds no attribute vectors ({error}); {expected}") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f" or vectors.ndim != 2:
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "several arrays"
        raise VectorsError(f"{path}: {expected}; found {found}")
    if not np.isfinite(vectors).all():
        raise VectorsError(f"{path}: {expected}; found some that are not finite")
    return vectors.astype(np.float32)


def _parse(numbers: bytes, dimension: int, place: str) -> NDArray[np.float32] | None:
    """The vector on a line, or None when the line belongs to a longer token that only begins with the wanted word."""
    fields = numbers.split()
    if len(fields) > dimension and not _is_number(fields[0]):
        return None  # glove.840B has tokens with spaces in them, such as "at name@domain.com"
    if len(fields) != dimension:
        raise VectorsError(f"{place}: expected {dimension} numbers, found {len(fields)}; is the file whole?")
    try:
        vector = np.array([float(field) for field in fields], np.float32)
    except ValueError as error:
        raise VectorsError(f"{place}: expected {dimension} numbers ({error})") from error
    if not np.isfinite(vector).all():
        raise VectorsError(f"{place}: expected finite numbers")
    return vector


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _suggestions(word: str, common: list[str]) -> list[str]:
    # difflib is slow: offer it only words that begin alike and are about as long
    near = [other for other in common if other[:1] == word[:1] and abs(len(other) - len(word)) <= 3]
    return difflib.get_close_matches(word, near, n=3, cutoff=0.7)
