"""A data set of one's own, from two tables: its images with their classes, and the classes with their attributes.

docs/own-data.md is the format. What the tables leave open (unseen and validation classes, which images are for testing)
is drawn by ``data.seed``; the result goes the same way as a real data set's listing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import pandas as pd

from svip.config import ConfigError, DataConfig
from svip.data.bundle import CLASS_ROLES, ROLES, TRAINVAL
from svip.data.errors import DataError
from svip.data.splits import ROLES_OF, Listing
from svip.data.tables import Table, class_problems, column_problems, nearest, read_table, refuse

SPLITS = {"val": "val_unseen", "test": "test_unseen"} | {role: role for role in CLASS_ROLES}
"""Values of the column split -> role of the class."""
PARTS = ("trainval", "test_seen", "test_unseen")
"""Values of the column role, if it does not hold roles."""
LONGEST_NAME = 255
"""Bytes of a file's or folder's name."""
FEWEST = 2
"""Classes that each class role needs at least: telling one class apart is no task."""


def read_custom(data: DataConfig) -> tuple[Listing, Path]:
    """The listing of the tables data.images and data.attributes, and the folder that the images' paths count from.

    ConfigError for settings that such a data set does not have; DataError names file, row and column of what is wrong.
    """
    if data.images is None or data.attributes is None:
        raise ConfigError("data.images, data.attributes: custom data needs both tables (--images, --attributes)")
    if (data.split, data.fold) != ("standard", 1):
        raise ConfigError(
            f"data.split={data.split}, data.fold={data.fold}: custom data has one standard split, so fold 1; give "
            "another data.seed, or another column split"
        )
    classes, images = _read_classes(Path(data.attributes)), _read_images(Path(data.images))
    names = classes["class"].tolist()
    refuse(data.images, list(_foreign_classes(images, names, data.attributes)))
    without = sorted(set(names) - set(images["class"]))
    if without:
        raise DataError(f"{data.attributes}: no image of {', '.join(without[:10])} in {data.images}; leave it out")
    class_roles = _class_roles(classes, images, data)
    if "role" in images:
        refuse(data.images, list(_contradictions(images, class_roles)))
    _check_class_roles(class_roles, data.attributes)
    ids = {name: class_id for class_id, name in enumerate(names)}
    listed = pd.DataFrame({"path": images["path"], "class_id": images["class"].map(ids)})
    if "role" in images:
        listed["part"] = images["role"].where(~images["role"].isin(TRAINVAL), "trainval")
        if "trainval" not in set(images["role"]):
            listed["role"] = images["role"]
    else:
        listed["part"] = _parts(listed, [class_roles[name] for name in names], data)
    attributes = classes.drop(columns=["class", "split"], errors="ignore")
    by_role = {role: {ids[name] for name in names if class_roles[name] == role} for role in CLASS_ROLES}
    roles = repr(images["role"].tolist()) if "role" in images else ""
    listing = Listing(
        images=listed,
        class_names=names,
        attributes=attributes.to_numpy(np.float32),
        attribute_names=list(attributes),
        train_classes={1: by_role["train"]},
        val_classes={1: by_role["val_unseen"]},
        # the listing's parts do not tell train from val_seen
        origin={"roles_sha256": hashlib.sha256(roles.encode()).hexdigest()},
    )
    return listing, Path(data.root or Path(data.images).parent)


def _read_classes(file: Path) -> pd.DataFrame:
    """class, perhaps split (as a class role), and the attributes as float32."""
    table = read_table(file)
    attributes = [name for name in table.header if name not in ("class", "split")]
    expected = ". Expected columns: class, a column of numbers for each attribute, and perhaps split"
    refuse(table.source, list(column_problems(table.header, ["class"], ["split", *attributes])), expected)
    if not attributes:
        raise DataError(f"{file}: no attributes{expected}")
    not_images = ". Is this the table of images (--images)?" if "path" in attributes else ""
    refuse(table.source, list(class_problems(table, "class", ["split"])), not_images)
    frame = table.frame()
    frame[attributes] = frame[attributes].astype(np.float32)
    twins = frame[frame.duplicated(attributes, keep=False)]
    if len(twins):
        raise DataError(f"{file}: {', '.join(twins['class'][:10])}: the same attributes, so they can't be told apart")
    if "split" in frame:
        refuse(table.source, list(_unknown_values(table, "split", SPLITS)))
        frame["split"] = frame["split"].map(SPLITS)
    return frame


def _read_images(file: Path) -> pd.DataFrame:
    """path, class, perhaps role, and where each row stands."""
    table = read_table(file)
    expected = ". Expected columns: path, class, and perhaps role"
    refuse(table.source, list(column_problems(table.header, ["path", "class"], ["role"])), expected)
    refuse(table.source, list(_image_problems(table)))
    frame = table.frame()
    frame["path"] = frame["path"].map(_normal)
    if "role" in frame:
        allowed = PARTS if "trainval" in set(frame["role"]) else ROLES
        refuse(table.source, list(_unknown_values(table, "role", allowed)))
    return frame.assign(where=[where for where, _ in table.rows])


def _image_problems(table: Table) -> Iterator[str]:
    places: dict[str, str] = {}
    for where, cells in table.rows:
        if len(cells) != len(table.header):
            yield f"{where}: expected {len(table.header)} cells, found {len(cells)}"
            continue
        row = dict(zip(table.header, cells, strict=True))
        path = _normal(row["path"])
        if path == "." or not row["class"]:
            yield f"{where}: expected a path and a class, found {cells}"
        elif "\0" in path or max(len(os.fsencode(part)) for part in PurePath(path).parts) > LONGEST_NAME:
            yield f"{where}, column 'path': {path[:60]!r} can't be the path of a file"
        elif PurePath(path).is_absolute() or ".." in PurePath(path).parts:
            yield f"{where}, column 'path': {path!r} leaves the data set's folder; give it from that folder on"
        elif path in places:
            yield f"{where}, column 'path': {path!r} is already in {places[path]}"
        places[path] = where


def _normal(path: str) -> str:
    """One spelling of a path: ``./a//b.jpg`` is ``a/b.jpg``."""
    return str(PurePosixPath(path))


def _unknown_values(table: Table, column: str, allowed: Sequence[str] | Mapping[str, str]) -> Iterator[str]:
    index = table.header.index(column)
    for where, cells in table.rows:
        if cells[index] not in allowed:
            yield f"{where}, column {column!r}: expected one of {', '.join(allowed)}, found {cells[index]!r}"


def _foreign_classes(images: pd.DataFrame, names: Sequence[str], attributes: str) -> Iterator[str]:
    known = set(names)
    for where, name in zip(images["where"], images["class"], strict=True):
        if name not in known:
            yield f"{where}, column 'class': {name!r} is not in {attributes}{nearest(name, names)}"


def _contradictions(images: pd.DataFrame, class_roles: Mapping[str, str]) -> Iterator[str]:
    for where, name, role in zip(images["where"], images["class"], images["role"], strict=True):
        class_role = class_roles[name]
        if role not in ROLES_OF[class_role] and not (role == "trainval" and class_role != "test_unseen"):
            yield f"{where}, column 'role': {role}, but its class {name!r} is {class_role}"


def _class_roles(classes: pd.DataFrame, images: pd.DataFrame, data: DataConfig) -> dict[str, str]:
    """Class -> role: as the column split says, else as the images' roles do, else by the seed."""
    names = classes["class"].tolist()
    if "split" in classes:
        return dict(zip(names, classes["split"], strict=True))
    rng = np.random.default_rng([data.seed, len(names)])
    order = rng.permutation(names).tolist()
    count = max(FEWEST, round(data.unseen_fraction * len(names)))
    unseen, val = set(order[:count]), set[str]()
    if "role" in images:
        unseen = set(images["class"][images["role"] == "test_unseen"])
        val = set(images["class"][images["role"] == "val_unseen"])
    seen = [name for name in order if name not in unseen]
    if "role" not in images or "trainval" in set(images["role"]):
        val = set(seen[: max(FEWEST, round(data.unseen_fraction * len(seen)))])
    return {name: "test_unseen" if name in unseen else "val_unseen" if name in val else "train" for name in names}


def _check_class_roles(class_roles: Mapping[str, str], source: str) -> None:
    for role in CLASS_ROLES:
        count = sum(found == role for found in class_roles.values())
        if count < FEWEST:
            raise DataError(
                f"{source}: {count} of {len(class_roles)} classes are {role}; expected {FEWEST} or more (a column "
                "split gives them by hand)"
            )


def _parts(listed: pd.DataFrame, class_roles: Sequence[str], data: DataConfig) -> pd.Series:
    """Unseen classes are for testing; of each seen class a share is held out as test_seen."""
    part = pd.Series("trainval", listed.index)
    for class_id, rows in listed.sort_values("path").groupby("class_id"):
        if class_roles[class_id] == "test_unseen":
            part[rows.index] = "test_unseen"
            continue
        order = np.random.default_rng([data.seed, class_id, 1]).permutation(rows.index.to_numpy())
        part[order[: min(max(round(data.unseen_fraction * len(order)), 1), len(order) - 1)]] = "test_seen"
    return part
