"""The split bundle: one folder with a packed image store, its tables, and where all of it came from.

``images.bin`` holds the raw uint8 RGB pixels of all images back to back (each [H, W, 3], sizes may differ);
``masks.bin``, where there is one, their object masks [H, W] in the same order. Both are memory-mapped, so that any
number of loader processes share one copy in the page cache and no image is decoded twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
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

FORMAT = 1
TRAINVAL = ("train", "val_seen", "val_unseen")
"""Roles whose images may be trained on once all choices are made."""
ROLES = (*TRAINVAL, "test_seen", "test_unseen")
"""Roles of an image."""
CLASS_ROLES = ("train", "val_unseen", "test_unseen")
"""Roles of a class; train and val_unseen classes are seen ones at test time."""
MISSING_NAMED = 20
"""How many missing photos bundle.json and error messages name."""


class BundleError(DataError):
    """A folder that is not a readable split bundle, or content that can't become one."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A split bundle on disk; made by ``read_bundle``. Copies in other processes map the files anew."""

    path: Path
    info: dict[str, Any]
    """Content of bundle.json."""
    split: pd.DataFrame
    """One row an image: path, class_id, role, offset (bytes), height, width (pixels)."""
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
        return self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    def mask(self, row: int) -> NDArray[np.uint8] | None:
        """Object mask of one image: a read-only view, uint8 [H, W]; None where the data set has no masks."""
        if self._masks is None:
            return None
        offset, height, width = self._places[row].tolist()
        return self._masks[offset // 3 : offset // 3 + height * width].reshape(height, width)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        return np.asarray(self.split[["offset", "height", "width"]], np.int64)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        return _map(self.path / "images.bin")

    @cached_property
    def _masks(self) -> NDArray[np.uint8] | None:
        path = self.path / "masks.bin"
        return _map(path) if path.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return read_bundle, (self.path,)  # a pickled memory map would carry all its pixels


def read_bundle(path: Path | str) -> Bundle:
    """Open a split bundle; BundleError when the folder is not one, or is incomplete or of another format."""
    path = Path(path).resolve()
    try:
        info = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is not a split bundle (no bundle.json); make one with `svip prepare-data`") from None
    except json.JSONDecodeError as error:
        raise BundleError(f"{path / 'bundle.json'} is not valid JSON ({error}); prepare the data again") from error
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path / 'bundle.json'}: expected format {FORMAT}, found {found}; prepare the data again")
    try:
        split = pd.read_parquet(path / "split.parquet")
        classes = pd.read_parquet(path / "classes.parquet")
        sizes = {name: (path / name).stat().st_size for name in ("images.bin", "masks.bin") if (path / name).exists()}
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise BundleError(f"{path} is not a whole split bundle ({error}); prepare the data again") from error
    pixels = int((split["height"].astype(np.int64) * split["width"]).sum())
    for name, expected in {"images.bin": 3 * pixels, "masks.bin": pixels}.items():
        if sizes.get(name, 0 if name == "images.bin" else expected) != expected:
            raise BundleError(f"{path / name}: expected {expected} bytes, found {sizes.get(name, 0)}; prepare again")
    return Bundle(path, info, split, classes)


class BundleWriter:
    """Writes a bundle to a temporary folder beside ``path``, which gets its name only once all is written.

    Used as a context manager: without ``finish`` (an error, an interrupt) nothing is left behind. An older bundle at
    ``path`` is replaced; BundleError when another kind of folder or file is there.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        if self.path.is_mount():
            raise BundleError(f"{self.path} is a mount point, which can't be renamed to; give a folder inside it")
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()) and not _is_bundle(self.path)):
            raise BundleError(f"{self.path} exists and is not a split bundle; give another output folder")
        self._folder = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._rows: list[tuple[str, int, str, int, int, int]] = []
        self._offset = 0
        self._masked = 0
        self._digests = {"images.bin": hashlib.sha256(), "masks.bin": hashlib.sha256()}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # already renamed away after finish

    def add(
        self, path: str, class_id: int, role: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None
    ) -> None:
        """Append one image, uint8 [H, W, 3], with its mask, uint8 [H, W] (all images have one, or none has)."""
        _check_roles((role,), ROLES)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BundleError(f"{path}: expected uint8 pixels [H, W, 3], found {image.dtype} {list(image.shape)}")
        if mask is not None and (mask.dtype != np.uint8 or mask.shape != image.shape[:2]):
            raise BundleError(
                f"{path}: expected a uint8 mask {list(image.shape[:2])}, found {mask.dtype} {list(mask.shape)}"
            )
        height, width = image.shape[:2]
        self._rows.append((path, int(class_id), role, self._offset, height, width))
        self._append("images.bin", image)
        if mask is not None:
            self._append("masks.bin", mask)
            self._masked += 1
        self._offset += image.size

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
        split = pd.DataFrame(self._rows, columns=["path", "class_id", "role", "offset", "height", "width"])
        split = split.astype({"class_id": np.int64, "offset": np.int64, "height": np.int32, "width": np.int32})
        classes = classes.reset_index(drop=True).astype(dict.fromkeys(classes.columns[2:], np.float32))
        self._check(split, classes)
        split.to_parquet(self._folder / "split.parquet", index=False)
        classes.to_parquet(self._folder / "classes.parquet", index=False)
        for name, text in (extra_files or {}).items():
            (self._folder / name).write_text(text, encoding="utf-8", newline="\n")
        counts = {
            "images": {role: int((split["role"] == role).sum()) for role in ROLES},
            "classes": {role: int((classes["role"] == role).sum()) for role in CLASS_ROLES},
            "missing": len(missing),
        }
        record = {
            "format": FORMAT,
            **info,
            "sha256": self._sha256(split, classes, extra_files or {}),
            "counts": counts,
            "missing": list(missing[:MISSING_NAMED]),
        }
        (self._folder / "bundle.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._publish()
        return read_bundle(self.path)

    def _append(self, name: str, array: NDArray[np.uint8]) -> None:
        data = np.ascontiguousarray(array).data
        with open(self._folder / name, "ab") as file:
            file.write(data)
        self._digests[name].update(data)

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

    def _sha256(self, split: pd.DataFrame, classes: pd.DataFrame, extra_files: Mapping[str, str]) -> str:
        """Hash of the content (pixels and values, not parquet's bytes, which differ between versions)."""
        total = hashlib.sha256()
        for name, digest in self._digests.items():
            total.update(f"{name} {digest.hexdigest()}\n".encode())
        for table in (split, classes):
            for column, values in table.items():
                numbers = pd.api.types.is_numeric_dtype(values)
                total.update(f"{column}\n".encode())
                total.update(_little_endian(values.to_numpy()) if numbers else json.dumps(list(values)).encode())
        for name in sorted(extra_files):
            total.update(f"{name}\n{extra_files[name]}".encode())
        return total.hexdigest()

    def _publish(self) -> None:
        if not self.path.exists():
            os.replace(self._folder, self.path)
            return
        old = self._folder.with_suffix(".old")
        os.replace(self.path, old)
        os.replace(self._folder, self.path)
        shutil.rmtree(old)


def _is_bundle(path: Path) -> bool:
    return (path / "bundle.json").is_file()


def _map(path: Path) -> NDArray[np.uint8]:
    # a plain view: np.memmap's own indexing is several times slower
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def _little_endian(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def _check_roles(roles: Sequence[str] | pd.Series, allowed: Sequence[str]) -> None:
    for role in roles:
        if role not in allowed:
            raise BundleError(f"unknown role {role!r}; expected one of {', '.join(allowed)}")
