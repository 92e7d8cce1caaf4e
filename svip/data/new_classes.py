"""Classes that a user describes in a CSV file: a column ``name``, and one a attribute in any order."""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from svip.data.bundle import DataError

LARGEST = 1e15
"""Largest magnitude of an attribute."""
NAMED = 10
"""How many of its problems the error of one file names."""


def parse_new_classes(content: bytes, attributes: Sequence[str], source: str) -> pd.DataFrame:
    """The classes of a CSV as a bundle has them: name, role (test_unseen), one float32 column an attribute, in order.

    ``source`` names the file in errors. DataError names the columns that are missing or unknown (with the nearest
    match), the cells that are no number (by line and column) and the names that stand there twice.
    """
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} is not a CSV in UTF-8 ({error}); save it as such") from error
    if len(lines) < 2:
        raise DataError(f"{source}: expected a header (name and the attributes), and a line for each class")
    (_, header), *rows = lines
    problems = list(_header_problems(header, ["name", *attributes]))
    hint = ". `svip predict --template FILE` writes the header" if problems else ""
    problems = problems or list(_row_problems(header, rows))
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError(f"{source}: {'; '.join(problems[:NAMED])}{more}{hint}")
    table = pd.DataFrame([cells for _, cells in rows], columns=header)
    numbers = table[list(attributes)].astype(np.float32)
    return pd.concat([table[["name"]].assign(role="test_unseen"), numbers], axis=1)


def _header_problems(header: Sequence[str], wanted: Sequence[str]) -> Iterator[str]:
    for column, count in Counter(header).items():
        if column not in wanted:
            yield f"unknown column {column!r}{_nearest(column, wanted)}"
        elif count > 1:
            yield f"column {column!r} stands there {count} times"
    for column in wanted:
        if column not in header:
            yield f"missing column {column!r}{_nearest(column, header)}"


def _row_problems(header: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]]) -> Iterator[str]:
    lines: dict[str, int] = {}
    for line, cells in rows:
        if len(cells) != len(header):
            yield f"line {line}: expected {len(header)} cells, found {len(cells)}"
            continue
        row = dict(zip(header, cells, strict=True))
        name = row.pop("name")
        if not name:
            yield f"line {line}: the class has no name"
        elif name in lines:
            yield f"line {line}: {name!r} is already the class of line {lines[name]}"
        lines[name] = line
        wrong = [column for column, cell in row.items() if not _is_number(cell)]
        for column in wrong:
            yield f"line {line}, column {column!r}: expected a number, found {row[column]!r}"
        if not wrong and not any(np.float32(cell) for cell in row.values()):
            yield f"line {line}: all attributes of {name!r} are 0, so nothing could be told to be it"


def _nearest(name: str, others: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1)
    return f" (nearest: {close[0]!r})" if close else ""


def _is_number(cell: str) -> bool:
    try:
        # as Python's literals but for 1_000; the squares of 312 such numbers are still finite in float32
        return "_" not in cell and abs(float(cell)) <= LARGEST
    except ValueError:
        return False
