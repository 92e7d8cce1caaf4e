"""One scan of a file of word vectors, text or binary, that keeps the few words needed and parses nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader

import numpy as np
from numpy.typing import NDArray

from svip.data.errors import DataError

COMMON = 100_000
"""How many first words of a file are kept to suggest from (files are ordered by frequency)."""
LONGEST = 1 << 20
"""Bytes of one line, or of one word before its numbers; more means that this is something else."""
MOST_NUMBERS = 100_000
"""Numbers a word that a header may announce."""
BLOCK = 1 << 20
"""Bytes of a binary file looked at together."""
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")
"""What text has none of, and a binary file's numbers soon have."""


class VectorsError(DataError):
    """Word or attribute vectors that can't be used; the message names the file, and the line or the attribute."""


@dataclass
class Words:
    """What a scan keeps of a file."""

    dimension: int
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Those of the wanted words that the file has, with their vectors [dimension]."""
    common: list[str] = field(default_factory=list)
    """The file's first words, at most COMMON."""


def scan(file: BufferedReader, name: str, wanted: Set[str]) -> Words:
    """Scan word vectors: text of GloVe or word2vec (which has a header), or word2vec's binary form.

    ``file``: at its beginning, with a buffer that holds several rows; ``name``: what messages call it. VectorsError
    names file and line of what can't be read; rows that are not wanted are not looked into.
    """
    head = file.peek()
    if not head:
        raise VectorsError(f"{name} is empty and holds no word vectors; is the file whole?")
    header = re.match(rb"(\d{1,12}) (\d{1,12})[ \t]*\r?\n", head)
    binary = CONTROL.search(head, header.end() if header else 0, 1 << 16)
    if not header and binary:
        raise VectorsError(f"{name} is neither text nor word2vec's binary form; expected {ACCEPTED}")
    if not header:
        return _scan_text(file, name, wanted, _dimension(head, name))
    file.readline()
    count, dimension = int(header[1]), int(header[2])
    if not 1 <= dimension <= MOST_NUMBERS or not count:
        raise VectorsError(f"{name} begins with {count} words of {dimension} numbers; expected a header of word2vec")
    if binary:
        return _scan_binary(file, name, wanted, dimension, count)
    if (found := _dimension(file.peek(), name)) != dimension:
        raise VectorsError(f"{name}: its header announces {dimension} numbers a word, its lines have {found}")
    return _scan_text(file, name, wanted, dimension, count)


ACCEPTED = "a word and its numbers on each line (GloVe, word2vec), word2vec's binary form, or a gensim KeyedVectors"


def _scan_text(file: BufferedReader, name: str, wanted: Set[str], dimension: int, count: int | None = None) -> Words:
    """``count``: the words that a header announced; the file then stands behind it."""
    keys = {word.encode(): word for word in wanted}
    found = Words(dimension)
    header = 0 if count is None else 1
    number, last = header, b""
    separator = b"\t" if b"\t" in file.peek().partition(b"\n")[0] else b" "
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), header + 1):
        if len(line) == LONGEST:
            raise VectorsError(f"{name}, line {number} is longer than {LONGEST:,} bytes; expected {ACCEPTED}")
        token, _, numbers = line.partition(separator)
        if number <= COMMON:
            found.common.append(token.decode(errors="replace"))
        word = keys.get(token)
        if word is not None and word not in found.rows:
            vector = _parse(numbers, dimension, f"{name}, line {number}")
            if vector is not None:
                found.rows[word] = vector
        last = line
    if len(last.split()) <= dimension:
        raise VectorsError(
            f"{name}, line {number}: expected a word and {dimension} numbers, found {max(len(last.split()) - 1, 0)}; "
            "is the file whole?"
        )
    if count not in (None, number - header):
        raise VectorsError(
            f"{name}: its header announces {count:,} words, found {number - header:,}; is the file whole?"
        )
    return found


def _scan_binary(file: BufferedReader, name: str, wanted: Set[str], dimension: int, count: int) -> Words:
    """Rows of a word, a space and float32 numbers; some writers end them with a new line."""
    keys = {word.encode(): word for word in wanted}
    found = Words(dimension)
    size, number, rest = 4 * dimension, 0, b""
    for block in iter(partial(file.read, BLOCK), b""):
        block, start = rest + block, 0
        while number < count and (space := block.find(b" ", start)) >= 0 and space + size < len(block):
            token = block[start:space].lstrip(b"\n")
            if number < COMMON:
                found.common.append(token.decode(errors="replace"))
            word = keys.get(token)
            if word is not None and word not in found.rows:
                vector = np.frombuffer(block, "<f4", dimension, space + 1).astype(np.float32)
                found.rows[word] = _finite(vector, f"{name}, word {word!r}")
            start = space + 1 + size
            number += 1
        rest = block[start:]
        if number == count or len(rest) > LONGEST + size:
            break
    if number < count or rest.strip(b"\n") or file.read(1):
        more = "more" if number == count else f"only {number:,}"
        raise VectorsError(
            f"{name}: its header announces {count:,} words of {dimension} numbers, found {more}; is the file whole?"
        )
    return found


def _dimension(head: bytes, name: str) -> int:
    """Numbers a row, as most of the first lines have it: a token may hold spaces, and a line may be cut short."""
    lines = head.split(b"\n")[:100]
    counts = Counter(_numbers(line.split()) for line in lines[: max(1, len(lines) - 1)])
    dimension = counts.most_common(1)[0][0]
    if not dimension:
        raise VectorsError(f"{name}: found no numbers on its first lines; expected {ACCEPTED}")
    return dimension


def _numbers(fields: list[bytes]) -> int:
    """How many numbers stand at the end of a line, behind at least one field of another kind (or a number's word)."""
    numbers = 0
    while numbers < len(fields) - 1 and _is_number(fields[-1 - numbers]):
        numbers += 1
    return numbers


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
    return _finite(vector, place)


def _finite(vector: NDArray[np.float32], place: str) -> NDArray[np.float32]:
    if not np.isfinite(vector).all():
        raise VectorsError(f"{place}: expected finite numbers")
    return vector


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
