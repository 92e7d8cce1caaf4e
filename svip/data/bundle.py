"""The split bundle: one folder with a packed image store, its tables, and where all of it came from.

``images.bin`` holds the raw uint8 RGB pixels of all images back to back (each [H, W, 3], sizes may differ);
``masks.bin``, where there is one, their object masks [H, W] in the same order. Both are memory-mapped, so that any
number of loader processes share one copy in the page cache and no image is decoded twice. ``sha256`` of bundle.json
stands for the content: pixels, labels, classes, but not the order in which the store holds the images.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from svip.data.errors import DataError
from svip.data.store import JOURNAL, Busy, Store, Stored, pixel_sha256, sync

FORMAT = 2
TRAINVAL = ("train", "val_seen", "val_unseen")
"""Roles whose images may be trained on once all choices are made."""
ROLES = (*TRAINVAL, "test_seen", "test_unseen")
"""Roles of an image."""
CLASS_ROLES = ("train", "val_unseen", "test_unseen")
"""Roles of a class; train and val_unseen classes are seen ones at test time."""
MISSING_NAMED = 20
"""How many missing photos bundle.json and error messages name."""
LONGEST_SIDE = 1 << 20
"""No image is larger, in pixels."""
MAPPED_AROUND = 1 << 16
"""Linux maps the cached pages around the one that is read too: those of the same 64 KiB, by default."""
NUMBERS, TEXTS = ("class_id", "offset", "height", "width"), ("path", "role", "sha256")
"""Columns of split.parquet."""
TABLES = ("split.parquet", "classes.parquet")
STORES = ("images.bin", "masks.bin")
FILE_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)
"""Of a file in a bundle; whoever writes a bundle.json may name no file outside of it."""


class BundleError(DataError):
    """A folder that is not a readable split bundle, or content that can't become one."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A split bundle on disk; made by ``read_bundle``. Copies in other processes map the files anew."""

    path: Path
    info: dict[str, Any]
    """Content of bundle.json."""
    split: pd.DataFrame
    """One row an image: path, class_id, role, offset (bytes), height, width (pixels), sha256 (of its pixels)."""
    classes: pd.DataFrame
    """One row a class in order of class_id: name, role, then one float32 column an attribute."""

    @property
    def sha256(self) -> str:
        return str(self.info["sha256"])

    @property
    def class_names(self) -> list[str]:
        return [str(name) for name in self.classes["name"]]

    @property
    def attribute_names(self) -> list[str]:
        return [str(name) for name in self.classes.columns[2:]]

    @cached_property
    def class_attributes(self) -> NDArray[np.float32]:
        """The class-attribute matrix, float32 [C, A]."""
        return np.ascontiguousarray(self.classes.iloc[:, 2:], np.float32)

    def rows(self, *roles: str) -> NDArray[np.int64]:
        """Ascending row numbers of the images with any of these roles."""
        _check_roles(roles, ROLES)
        return np.flatnonzero(self.split["role"].isin(roles).to_numpy())

    def classes_with(self, *roles: str) -> NDArray[np.int64]:
        """Ascending ids of the classes with any of these class roles (train, val_unseen, test_unseen)."""
        _check_roles(roles, CLASS_ROLES)
        return np.flatnonzero(self.classes["role"].isin(roles).to_numpy())

    def image(self, row: int) -> NDArray[np.uint8]:
        """RGB pixels of one image: a read-only view, uint8 [H, W, 3]."""
        offset, height, width = self._places[row].tolist()
        pixels = np.frombuffer(self._pixels, np.uint8, height * width * 3, offset)
        return pixels.reshape(height, width, 3)

    def mask(self, row: int) -> NDArray[np.uint8] | None:
        """Object mask of one image: a read-only view, uint8 [H, W]; None where the data set has no masks."""
        if self._masks is None:
            return None
        offset, height, width = self._places[row].tolist()
        return np.frombuffer(self._masks, np.uint8, height * width, offset // 3).reshape(height, width)

    def release(self, row: int) -> None:
        """Give back the memory through which an image was read; views of it stay valid, and fetch it again.

        A process that reads many images without it ends up with the whole store in its resident memory.
        """
        offset, height, width = self._places[row].tolist()
        start, end = offset // MAPPED_AROUND * MAPPED_AROUND, offset + height * width * 3
        length = min(-(-end // MAPPED_AROUND) * MAPPED_AROUND, len(self._pixels)) - start
        self._pixels.madvise(mmap.MADV_DONTNEED, start, length)

    def verify(self) -> None:
        """Read everything, and raise BundleError where it is not what bundle.json's sha256 stands for."""
        damaged = []
        for row, (path, expected) in enumerate(zip(self.split["path"], self.split["sha256"], strict=True)):
            if pixel_sha256(self.image(row), self.mask(row)) != expected:
                damaged.append(str(path))
            self.release(row)
        if damaged:
            named = ", ".join(damaged[:MISSING_NAMED])
            raise BundleError(f"{self.path}: the pixels of {len(damaged)} images are damaged ({named}); prepare again")
        extra = {
            name: (self.path / name).read_text(encoding="utf-8")
            for name in self.info["files"]
            if name not in (*TABLES, *STORES)
        }
        if _content_sha256(self.split, self.classes, extra) != self.sha256:
            raise BundleError(f"{self.path}: tables or text files don't fit the sha256 of bundle.json; prepare again")

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        return np.asarray(self.split[["offset", "height", "width"]], np.int64)

    @cached_property
    def _pixels(self) -> mmap.mmap:
        return _map(self.path / "images.bin")

    @cached_property
    def _masks(self) -> mmap.mmap | None:
        path = self.path / "masks.bin"
        return _map(path) if path.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return read_bundle, (self.path,)  # a pickled memory map would carry all its pixels


def read_bundle(path: Path | str) -> Bundle:
    """Open a split bundle; BundleError when the folder is not one, or is incomplete or of another format."""
    path = Path(path).resolve()
    try:
        info = parse_info((path / "bundle.json").read_bytes(), str(path / "bundle.json"))
    except FileNotFoundError:
        raise BundleError(f"{path} is not a split bundle (no bundle.json); make one with `svip prepare-data`") from None
    try:
        for name, expected in info["files"].items():
            size = (path / name).stat().st_size
            if size != expected:
                raise BundleError(f"{path / name}: expected {expected} bytes, found {size}; prepare again")
        split, classes = (pd.read_parquet(path / name) for name in TABLES)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path} is not a whole split bundle ({error}); prepare the data again") from error
    _check_tables(path, split, classes)
    return Bundle(path, info, split, classes)


def parse_info(content: bytes, source: str) -> dict[str, Any]:
    """The content of a bundle.json, which errors call ``source``; BundleError when it is another format's or none."""
    try:
        info = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{source} is not valid JSON ({error}); prepare the data again") from error
    found = info.get("format") if isinstance(info, dict) else "no mapping"
    if found != FORMAT:
        raise BundleError(f"{source}: expected format {FORMAT}, found {found}; prepare the data again with this svip")
    files = info.get("files")
    if not isinstance(files, dict) or not all(
        FILE_NAME.fullmatch(name) and type(size) is int for name, size in files.items()
    ):
        raise BundleError(f"{source}: expected the field files, with plain names and bytes; prepare the data again")
    if not re.fullmatch("[0-9a-f]{64}", str(info.get("sha256"))):
        raise BundleError(f"{source}: expected the field sha256, of 64 hex digits; prepare the data again")
    return info


def _check_tables(path: Path, split: pd.DataFrame, classes: pd.DataFrame) -> None:
    """Whatever they say, no image may reach beyond the store or into another one."""

    def expect(fulfilled: bool, table: str, expected: str) -> None:
        if not fulfilled:
            raise BundleError(f"{path / table}: expected {expected}; prepare the data again")

    types = pd.api.types
    expect(len(split) > 0, TABLES[0], "at least one image")
    expect({*NUMBERS, *TEXTS} <= set(split), TABLES[0], f"the columns {', '.join((*TEXTS, *NUMBERS))}")
    expect(all(types.is_integer_dtype(split[name]) for name in NUMBERS), TABLES[0], f"integers in {NUMBERS}")
    expect(all(types.is_string_dtype(split[name]) for name in TEXTS), TABLES[0], f"text in {TEXTS}")
    expect(list(classes.columns[:2]) == ["name", "role"], TABLES[1], "name, role and one column an attribute")
    expect(all(map(types.is_numeric_dtype, classes.dtypes.iloc[2:])), TABLES[1], "numbers as attributes")
    for table, roles, allowed in ((TABLES[0], split["role"], ROLES), (TABLES[1], classes["role"], CLASS_ROLES)):
        expect(bool(roles.isin(allowed).all()), table, f"only the roles {', '.join(allowed)}")
    expect(bool(split["class_id"].between(0, len(classes) - 1).all()), TABLES[0], f"class ids below {len(classes)}")
    sides = split[["height", "width"]].to_numpy(np.int64)
    expect(bool(((sides > 0) & (sides <= LONGEST_SIDE)).all()), TABLES[0], f"sides of 1..{LONGEST_SIDE} pixels")
    order = np.argsort(split["offset"].to_numpy())
    ends = 3 * sides.prod(1)[order].cumsum()
    starts = np.concatenate([[0], ends])  # in bytes; one more than there are images
    expect(np.array_equal(split["offset"].to_numpy()[order], starts[:-1]), TABLES[0], "images back to back, none twice")
    for name, expected in zip(STORES, (int(starts[-1]), int(starts[-1]) // 3), strict=True):
        if (path / name).exists() or name == STORES[0]:
            size = (path / name).stat().st_size
            expect(size == expected, name, f"{expected} bytes as {TABLES[0]} says, found {size}")


class BundleWriter:
    """Writes a bundle to a work folder beside ``path``, which gets its name only once all is written.

    Used as a context manager. An older bundle at ``path`` is replaced; BundleError when another kind of folder or file
    is there, or while another process writes to it. Without ``finish`` (an error, an interrupt) nothing is left behind,
    unless ``origins`` says per path what an image is made from: then the images written so far stay in the work folder
    (``.NAME.part``), and the next writer finds those of the same origin in ``stored``.
    """

    def __init__(self, path: Path | str, origins: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path).resolve()
        if self.path.is_mount():
            raise BundleError(f"{self.path} is a mount point, which can't be renamed to; give a folder inside it")
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()) and not _is_bundle(self.path)):
            raise BundleError(f"{self.path} exists and is not a split bundle; give another output folder")
        self._origins = origins
        self._folder = self.path.with_name(f".{self.path.name}.part")
        self._labels: dict[str, tuple[int, str]] = {}
        self._masked = 0
        self._published = False

    def __enter__(self) -> Self:
        try:
            self._store = Store(self._folder, self._origins)
        except Busy:
            raise BundleError(f"{self.path} is being written by another process; wait for it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close(keep=self._published or self._origins is not None)

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The images written so far, by their path."""
        return self._store.images

    def add(
        self, path: str, class_id: int, role: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None
    ) -> None:
        """Append one image, uint8 [H, W, 3], with its mask, uint8 [H, W] (all images have one, or none has)."""
        _check_roles((role,), ROLES)
        self.store(path, image, mask)
        self.label(path, class_id, role)

    def store(
        self, path: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None, sha256: str = ""
    ) -> None:
        """The first half of ``add``. ``sha256``: the image's pixel_sha256 where known."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BundleError(f"{path}: expected uint8 pixels [H, W, 3], found {image.dtype} {list(image.shape)}")
        if mask is not None and (mask.dtype != np.uint8 or mask.shape != image.shape[:2]):
            raise BundleError(
                f"{path}: expected a uint8 mask {list(image.shape[:2])}, found {mask.dtype} {list(mask.shape)}"
            )
        if path in self.stored:
            raise BundleError(f"{path}: there is an image of this path already")
        self._store.append(path, image, mask, sha256)
        self._masked += mask is not None

    def label(self, path: str, class_id: int, role: str) -> None:
        """The second half of ``add``; the bundle lists its images in the order of these calls."""
        _check_roles((role,), ROLES)
        self._labels[path] = int(class_id), role

    def finish(
        self,
        classes: pd.DataFrame,
        info: Mapping[str, Any],
        extra_files: Mapping[str, str] | None = None,
        missing: Sequence[str] = (),
    ) -> Bundle:
        """Write tables and bundle.json, give the folder its name, and open it.

        ``classes``: name, role and one column an attribute, in order of class_id. ``info``: dataset, split, fold,
        settings, source. ``extra_files``: name -> text. ``missing``: listed photos that are not in the store.
        """
        split = self._split_table()
        classes = classes.reset_index(drop=True).astype(dict.fromkeys(classes.columns[2:], np.float32))
        self._check(split, classes)
        for name, table in zip(TABLES, (split, classes), strict=True):
            table.to_parquet(self._folder / name, index=False)
        for name, text in (extra_files or {}).items():
            (self._folder / name).write_text(text, encoding="utf-8", newline="\n")
        counts = {
            "images": {role: int((split["role"] == role).sum()) for role in ROLES},
            "classes": {role: int((classes["role"] == role).sum()) for role in CLASS_ROLES},
            "missing": len(missing),
        }
        files = sorted(file for file in self._folder.iterdir() if file.name not in (JOURNAL, "bundle.json"))
        record = {
            "format": FORMAT,
            **info,
            "sha256": _content_sha256(split, classes, extra_files or {}),
            "counts": counts,
            "missing": list(missing[:MISSING_NAMED]),
            "files": {file.name: file.stat().st_size for file in files},
        }
        (self._folder / "bundle.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._publish()
        return read_bundle(self.path)

    def _split_table(self) -> pd.DataFrame:
        offsets, end = {}, 0
        for path, stored in self.stored.items():
            offsets[path] = end
            end += stored.height * stored.width * 3
        if offsets.keys() != self._labels.keys():
            raise BundleError(f"{self.path}: {len(offsets)} images are stored, but {len(self._labels)} have a label")
        rows = [
            (path, class_id, role, offsets[path], self.stored[path].height, self.stored[path].width)
            for path, (class_id, role) in self._labels.items()
        ]
        split = pd.DataFrame(rows, columns=["path", "class_id", "role", "offset", "height", "width"])
        split["sha256"] = [self.stored[path].sha256 for path in self._labels]
        return split.astype({"class_id": np.int64, "offset": np.int64, "height": np.int32, "width": np.int32})

    def _check(self, split: pd.DataFrame, classes: pd.DataFrame) -> None:
        if split.empty:
            raise BundleError(f"{self.path}: a bundle needs at least one image")
        if self._masked not in (0, len(split)):
            raise BundleError(f"{self.path}: {self._masked} of {len(split)} images have a mask; expected all or none")
        if list(classes.columns[:2]) != ["name", "role"] or not classes.columns.is_unique:
            raise BundleError(f"{self.path}: expected the class columns name, role and distinct attribute names")
        _check_roles(classes["role"], CLASS_ROLES)
        if not split["class_id"].between(0, len(classes) - 1).all():
            raise BundleError(f"{self.path}: class ids must lie in 0..{len(classes) - 1}")

    def _publish(self) -> None:
        self._store.sync()
        old = self._folder.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed just here
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self._folder, self.path)
        self._published = True
        sync(self.path.parent)
        # the lock: without it another writer may begin, in a work folder of its own now
        (self.path / JOURNAL).unlink()
        shutil.rmtree(old, ignore_errors=True)


def _is_bundle(path: Path) -> bool:
    return (path / "bundle.json").is_file()


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _content_sha256(split: pd.DataFrame, classes: pd.DataFrame, extra_files: Mapping[str, str]) -> str:
    """Hash of the content: values, not parquet's bytes, which differ between versions; pixels by their own sha256."""
    total = hashlib.sha256()
    for table in (split.drop(columns="offset"), classes):
        for column, values in table.items():
            numbers = pd.api.types.is_numeric_dtype(values)
            total.update(f"{column}\n".encode())
            total.update(_little_endian(values.to_numpy()) if numbers else json.dumps(list(values)).encode())
    for name in sorted(extra_files):
        total.update(f"{name}\n{extra_files[name]}".encode())
    return total.hexdigest()


def _little_endian(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def _check_roles(roles: Sequence[str] | pd.Series, allowed: Sequence[str]) -> None:
    for role in roles:
        if role not in allowed:
            raise BundleError(f"unknown role {role!r}; expected one of {', '.join(allowed)}")
