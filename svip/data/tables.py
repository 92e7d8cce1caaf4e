"""Tables that users write: read as text, cell by cell, so that an error can name file, line and column."""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from svip.data.errors import DataError

LARGEST = 1e15
"""Largest magnitude of an attribute."""
NAMED = 10
"""How many of its problems the error of one file names."""


@dataclass(frozen=True)
class Table:
    """A table's content."""

    source: str
    """Names the file in errors."""
    header: list[str]
    rows: list[tuple[str, list[str]]]
    """Where each row stands (``line 2``), and its cells; perhaps more or fewer than the header's."""

    def frame(self) -> pd.DataFrame:
        """All cells as text."""
        return pd.DataFrame([cells for _, cells in self.rows], columns=self.header, dtype=str)


def read_table(path: Path) -> Table:
    """A CSV with a header, or Parquet (``.parquet``); DataError when the file is not such a table, or has no row."""
    try:
        content = path.read_bytes()
        frame = pd.read_parquet(io.BytesIO(content)) if path.suffix == ".parquet" else None
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(f"can't read the table {path}: {getattr(error, 'strerror', None) or error}") from error
    if frame is None:
        return parse_csv(content, str(path))
    if frame.empty:
        raise DataError(f"{path}: expected columns and at least one row")
    cells = frame.astype(object).where(frame.notna(), "").astype(str).to_numpy().tolist()
    return Table(str(path), [str(name) for name in frame], [(f"row {n}", row) for n, row in enumerate(cells, start=1)])


def parse_csv(content: bytes, source: str) -> Table:
    """The table in a CSV in UTF-8; empty lines are left out. DataError as in ``read_table``."""
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        lines = [(f"line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} is not a CSV in UTF-8 ({error}); save it as such") from error
    if len(lines) < 2:
        raise DataError(f"{source}: expected a header, and a line for each entry")
    header = lines[0][1]
    if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), "")):
        raise DataError(f"{source}: its cells are separated by {mark!r}; save it with commas, and numbers with points")
    return Table(source, header, lines[1:])


def refuse(source: str, problems: Sequence[str], hint: str = "") -> None:
    """DataError that names the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError(f"{source}: {'; '.join(problems[:NAMED])}{more}{hint}")


def column_problems(header: Sequence[str], wanted: Sequence[str], optional: Sequence[str] = ()) -> Iterator[str]:
    """Columns that have no name, stand there twice, are unknown (with the nearest match) or missing."""
    known = [*wanted, *optional]
    for column, count in Counter(header).items():
        if not column:
            yield f"column {header.index(column) + 1} has no name; leave it out, or name it"
        elif column not in known:
            yield f"unknown column {column!r}{nearest(column, known)}"
        elif count > 1:
            yield f"column {column!r} stands there {count} times"
    for column in wanted:
        if column not in header:
            yield f"missing column {column!r}{nearest(column, header)}"


def class_problems(table: Table, key: str, text: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with rows that describe a class each, named in the column ``key``; other columns hold numbers."""
    places: dict[str, str] = {}
    for where, cells in table.rows:
        if len(cells) != len(table.header):
            yield f"{where}: expected {len(table.header)} cells, found {len(cells)}"
            continue
        row = {name: cell for name, cell in zip(table.header, cells, strict=True) if name not in text}
        name = row.pop(key)
        if not name:
            yield f"{where}: the class has no name"
        elif name in places:
            yield f"{where}: {name!r} is already the class of {places[name]}"
        places[name] = where
        wrong = [column for column, cell in row.items() if not is_number(cell)]
        for column in wrong:
            yield f"{where}, column {column!r}: expected a number, found {row[column]!r}"
        if not wrong and not any(np.float32(cell) for cell in row.values()):
            yield f"{where}: all attributes of {name!r} are 0, so nothing could be told to be it"


def nearest(name: str, others: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1)
    return f" (nearest: {close[0]!r})" if close else ""


def is_number(cell: str) -> bool:
    try:
        # as Python's literals but for 1_000; the squares of 312 such numbers are still finite in float32
        return "_" not in cell and abs(float(cell)) <= LARGEST
    except ValueError:
        return False
