"""From xlsa17's Proposed Split to one table of images with their roles.

xlsa17 (Xian et al.) lists the images of a data set in res101.mat and parts them by 1-based index in att_splits.mat.
Only ``trainval_loc``, ``test_seen_loc`` and ``test_unseen_loc`` are used, which both versions of the Proposed Split
have: version 1 of ``train_loc`` and ``val_loc`` contains every test_seen image, and version 2 comes without them. Train
and validation come from the class folds inside trainval_loc instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.io import loadmat, whosmat

from svip.config import DataConfig
from svip.data import apy
from svip.data.bundle import MISSING_NAMED, ROLES
from svip.data.catalog import DatasetSpec
from svip.data.errors import DataError

FOLDS = (1, 2, 3)
MOST_VALUES = 10_000_000
"""Numbers or strings that a variable may hold: a small packed file can claim to hold any number."""
ROLES_OF = {
    "train": {"train", "val_seen", "test_seen"},
    "val_unseen": {"val_unseen", "test_seen"},
    "test_unseen": {"test_unseen"},
}
"""Role of a class -> roles that its images may have."""


@dataclass(frozen=True, eq=False)
class Listing:
    """What xlsa17, or a user's tables, say about one data set: all its images and classes, photos there or not."""

    images: pd.DataFrame
    """One row an image in the source's order: path (from the data set's folder on), class_id, part, and role where a
    user's table has given it."""
    class_names: list[str]
    """In order of class_id, which is xlsa17's, not that of the data set's own class list."""
    attributes: NDArray[np.float32]
    """The class-attribute matrix [C, A]."""
    attribute_names: list[str]
    train_classes: dict[int, set[int]]
    """Class ids of each fold's train classes."""
    val_classes: dict[int, set[int]]
    """Class ids of each fold's validation classes."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Recorded in the bundle: which version of the Proposed Split it is, and how many test_seen images its train_loc
    and val_loc contain (this listing's trainval part does not)."""
    crops: Mapping[str, apy.Crop] = field(default_factory=dict)
    """Path of an image that is a part of a photo -> that part; other paths are the photo's own."""
    hint: str = ""
    """What to say, besides, where photos are missing."""

    def photo(self, path: str) -> str:
        """Path of the photo that shows an image."""
        return self.crops[path].photo if path in self.crops else path


@dataclass(frozen=True, eq=False)
class Split:
    """Roles of the images that go into a bundle."""

    images: pd.DataFrame
    """path, class_id, role."""
    classes: pd.DataFrame
    """name, role, one float32 column an attribute; order = class_id."""
    missing: list[str]
    """Paths of needed photos that are not there."""
    dropped_classes: list[str]
    """Classes of this split that have no photo at all and were left out."""
    crops: Mapping[str, apy.Crop] = field(default_factory=dict)
    """As in the listing."""


def read_listing(spec: DatasetSpec, folder: Path, attribute_file: Path) -> Listing:
    """Read and check xlsa17's ``folder`` of one data set.

    DataError when the catalog's counts, the order of classes, the disjointness of seen and unseen classes or of the
    parts, or the range of the 1-based indices is not as it must be.
    """
    splits = _load(folder / "att_splits.mat", ["allclasses_names", "att", *_LOCS], _LEAKING)
    listed = _load(folder / "res101.mat", ["image_files", "labels"])
    names = _strings(splits["allclasses_names"])
    _expect(folder / "att_splits.mat", "classes", len(set(names)), spec.classes)
    _expect(folder / "att_splits.mat", "shape of att", splits["att"].shape, (spec.attributes, spec.classes))
    attributes = np.ascontiguousarray(splits["att"].T, np.float32)  # [C, A]

    files = _strings(listed["image_files"])
    crops: dict[str, apy.Crop] = {}
    if spec.name == "apy":
        crops, own_classes = apy.read_objects(attribute_file.parent, files)
        paths = list(crops)
    else:
        paths = [relative_path(file, spec.folder) for file in files]
        own_classes = [_folder_class(path) for path in paths]
    _expect(folder / "res101.mat", "distinct image_files", len(set(paths)), spec.images)
    class_ids = _zero_based(listed["labels"], spec.classes, f"{folder / 'res101.mat'}: labels")
    _expect(folder / "res101.mat", "labels", len(class_ids), len(paths))
    for path, class_id, own_class in zip(paths, class_ids, own_classes, strict=True):
        if own_class != names[class_id]:
            raise DataError(f"{folder / 'res101.mat'}: {path} is labelled {names[class_id]}, but it is of {own_class}")

    where = folder / "att_splits.mat"
    locs = {key: _zero_based(splits[key], len(paths), f"{where}: {key}") for key in _LOCS}
    part = np.full(len(paths), "", object)
    for key, loc in locs.items():
        name = key.removesuffix("_loc")
        _expect(where, f"distinct indices in {key}", len(np.unique(loc)), getattr(spec, name))
        if (part[loc] != "").any():
            raise DataError(f"{where}: {(part[loc] != '').sum()} images of {key} are in another part too")
        part[loc] = name

    train = {fold: _class_set(folder / f"trainclasses{fold}.txt", names) for fold in FOLDS}
    val = {fold: _class_set(folder / f"valclasses{fold}.txt", names) for fold in FOLDS}
    unseen = _class_set(folder / "testclasses.txt", names)
    _expect(folder / "testclasses.txt", "classes", len(unseen), spec.unseen_classes)
    seen = set(range(len(names))) - unseen
    for fold in FOLDS:
        _expect(folder / f"valclasses{fold}.txt", "classes", len(val[fold]), spec.val_classes)
        if train[fold] & val[fold] or train[fold] | val[fold] != seen:
            raise DataError(f"{folder}: train and validation classes of fold {fold} don't part the seen classes")
    for key, allowed in {"trainval_loc": seen, "test_seen_loc": seen, "test_unseen_loc": unseen}.items():
        if set(class_ids[locs[key]].tolist()) != allowed:
            raise DataError(f"{where}: the classes of {key} are not those that testclasses.txt leaves to it")

    leaked = _leaked(splits)
    return Listing(
        images=pd.DataFrame({"path": paths, "class_id": class_ids, "part": part.astype(str)}),
        class_names=names,
        attributes=attributes,
        attribute_names=read_attribute_names(attribute_file, spec.attributes),
        train_classes=train,
        val_classes=val,
        origin={"proposed_split": 1 if leaked else 2, "test_seen_in_train_or_val_loc": leaked},
        crops=crops,
        hint=". ".join(
            filter(None, [f"`svip fetch {spec.name} --root ROOT --again` unpacks them anew", spec.mistaken_for])
        ),
    )


def proposed_split_version(folder: Path) -> int:
    """1 or 2: by whether train_loc and val_loc in ``folder``'s att_splits.mat contain test_seen images."""
    return 1 if _leaked(_load(folder / "att_splits.mat", ["test_seen_loc"], _LEAKING)) else 2


def make_split(listing: Listing, data: DataConfig, present: NDArray[np.bool_]) -> Split:
    """Give every image its role.

    ``present`` [images of the listing]: whether its photo is there. Missing photos are a DataError that counts and
    names them, unless data.allow_missing. Held-out images are drawn per class from those present, by data.seed.

    standard: the fold's train classes give train and val_seen, its validation classes val_unseen; test as listed.
    development: only trainval images. Validation classes play test_unseen; train classes that are validation classes
    of the next fold play val_unseen; test_seen is held out of all train classes of the fold, val_seen of the rest.
    """
    development = data.split == "development"
    train, val = listing.train_classes[data.fold], listing.val_classes[data.fold]
    every = set(range(len(listing.class_names)))
    if development:
        next_val = listing.val_classes[data.fold % len(FOLDS) + 1]
        class_sets = {"train": train - next_val, "val_unseen": train & next_val, "test_unseen": val}
    else:
        class_sets = {"train": train, "val_unseen": val, "test_unseen": every - train - val}
    class_roles = {class_id: role for role, class_ids in class_sets.items() for class_id in class_ids}

    part = listing.images["part"].to_numpy()
    needed = part == "trainval" if development else np.ones(len(part), bool)
    missing = listing.images["path"][needed & ~present].tolist()
    if missing and not data.allow_missing:
        raise DataError(_missing_message(missing, int(needed.sum()), listing.hint))
    if not (needed & present).any():
        raise DataError(f"none of the {needed.sum()} listed photos is there, such as {missing[0]}")
    images = listing.images[needed & present].copy()
    if "role" not in images:
        images["role"] = images["part"].where(images["part"] != "trainval", images["class_id"].map(class_roles))
        _hold_out_images(images, train, class_roles, data)

    present_ids = sorted(images["class_id"].unique())
    new_ids = {class_id: number for number, class_id in enumerate(present_ids)}
    images["class_id"] = images["class_id"].map(new_ids).astype(np.int64)
    classes = pd.DataFrame(listing.attributes[present_ids], columns=listing.attribute_names)
    classes.insert(0, "name", [listing.class_names[class_id] for class_id in present_ids])
    classes.insert(1, "role", [class_roles[class_id] for class_id in present_ids])
    split = Split(
        images=images[["path", "class_id", "role"]].reset_index(drop=True),
        classes=classes,
        missing=missing,
        dropped_classes=[listing.class_names[class_id] for class_id in sorted(class_roles.keys() - new_ids.keys())],
        crops=listing.crops,
    )
    check_split(split, data)
    return split


def check_split(split: Split, data: DataConfig) -> None:
    """DataError unless each image has one role, each role an image, and no unseen class an image of a seen role."""
    if not split.images["path"].is_unique:
        raise DataError("an image is listed in two roles")
    class_roles = split.classes["role"].to_numpy()[split.images["class_id"]]
    for class_role, roles in ROLES_OF.items():
        found = set(split.images["role"][class_roles == class_role])
        if not found <= roles:
            raise DataError(f"{class_role} classes have images of the roles {', '.join(sorted(found - roles))}")
    for role in ROLES:
        if not (split.images["role"] == role).any():
            hint = "try more photos, a larger data.val_seen_fraction or another data.fold"
            if data.dataset == "custom":
                hint = "list more photos of each class, or give it to some where the table has a column role"
            elif role.startswith("test") and data.split == "standard":
                hint = "set data.split=development for a whole zero-shot problem inside the trainval photos"
            raise DataError(f"no photo is left for the role {role}; {hint}")


def relative_path(file: str, folder: str) -> str:
    """The part of an author's absolute path after the last ``folder`` in it, '/'-separated."""
    parts = [part for part in file.replace("\\", "/").split("/") if part]
    if folder not in parts[:-1]:
        raise DataError(f"image_files: {file!r} has no folder {folder!r} in its path")
    last = len(parts) - 2 - parts[-2::-1].index(folder)
    return "/".join(parts[last + 1 :])


def read_attribute_names(file: Path, count: int) -> list[str]:
    """Attribute names in column order: lines, numbered ("1 name") or not, or a MATLAB cell array ``attributes``."""
    if file.suffix == ".mat":
        names = _strings(_load(file, ["attributes"])["attributes"])
    else:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        lines = [name.split(maxsplit=1) for name in names]
        if any(line[0].isdigit() for line in lines):
            for number, line in enumerate(lines, start=1):
                if len(line) != 2 or line[0] != str(number):
                    raise DataError(f"{file}: line {number}: expected '{number} <name>', found {' '.join(line)!r}")
            names = [name for _, name in lines]
    _expect(file, "distinct attribute names", len(set(names)), count)
    return names


_LOCS = ("trainval_loc", "test_seen_loc", "test_unseen_loc")
_LEAKING = ("train_loc", "val_loc")
_TEXTS = ("allclasses_names", "image_files", "attributes")


def _leaked(splits: Mapping[str, Any]) -> int:
    leaking = [splits[key].ravel() for key in _LEAKING if key in splits]
    return len(np.intersect1d(np.concatenate(leaking), splits["test_seen_loc"])) if leaking else 0


def _hold_out_images(images: pd.DataFrame, train: set[int], class_roles: Mapping[int, str], data: DataConfig) -> None:
    """Give images of the fold's train classes the roles val_seen and, in the development split, test_seen."""
    trainval = images[images["part"] == "trainval"].sort_values("path")
    for class_id in sorted(train):
        rows = trainval.index[trainval["class_id"] == class_id].to_numpy()
        order = rows[np.random.default_rng([data.seed, class_id]).permutation(len(rows))]
        if data.split == "development":
            order = _hold_out(images, order, "test_seen", data.val_seen_fraction)
        if class_roles[class_id] == "train":
            _hold_out(images, order, "val_seen", data.val_seen_fraction)


def _hold_out(images: pd.DataFrame, order: NDArray[Any], role: str, fraction: float) -> NDArray[Any]:
    """Give the first ``fraction`` of ``order`` (at least one, never all) that role; return the others."""
    count = min(max(round(fraction * len(order)), 1), len(order) - 1) if fraction > 0 else 0
    images.loc[order[:count], "role"] = role
    return order[count:]


def _folder_class(path: str) -> str:
    """images/002.Laysan_Albatross/x.jpg -> 002.Laysan_Albatross; SUN: c/chapel/indoor/x.jpg -> chapel_indoor."""
    return "_".join(path.split("/")[1:-1])


def _load(file: Path, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; it is part of the original archives")
    wanted = [*keys, *optional]
    try:
        sizes = {name: math.prod(shape) for name, shape, _ in whosmat(file)}
        content = {}
        if max((sizes[name] for name in wanted if name in sizes), default=0) <= MOST_VALUES:
            content = loadmat(file, variable_names=wanted)
    except Exception as error:  # scipy raises whatever its parser meets
        raise DataError(f"{file} is not a readable MATLAB file: {error}") from error
    absent = [key for key in keys if key not in content]
    if absent:
        raise DataError(f"{file}: no variable {', '.join(absent)} of a sane size; fetch it again")
    for key in (key for key in wanted if key in content):
        _check_kind(content[key], is_text=key in _TEXTS, where=f"{file}: {key}")
    return dict(content)


def _check_kind(values: Any, is_text: bool, where: str) -> None:
    """DataError unless it is a cell array of strings, or finite real numbers."""
    if is_text:
        cells = values.ravel() if isinstance(values, np.ndarray) and values.dtype == object else [None]
        right = all(isinstance(cell, np.ndarray) and cell.dtype.kind == "U" and cell.size == 1 for cell in cells)
    else:
        right = isinstance(values, np.ndarray) and values.dtype.kind in "iuf" and bool(np.isfinite(values).all())
    if not right:
        kind = "a cell array of strings" if is_text else "finite numbers"
        raise DataError(f"{where}: expected {kind}; the file is damaged or of another kind, fetch it again")


def _strings(cells: NDArray[Any]) -> list[str]:
    return [str(cell.item()).strip() for cell in cells.ravel()]


def _zero_based(indices: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    """1-based indices (MATLAB) to 0-based ones."""
    flat = indices.ravel().astype(np.int64)
    if (flat != indices.ravel()).any():
        raise DataError(f"{where}: expected whole numbers")
    if flat.size and (flat.min() < 1 or flat.max() > count):
        raise DataError(f"{where}: expected indices in 1..{count} (1-based), found {flat.min()}..{flat.max()}")
    return flat - 1


def _class_set(file: Path, names: list[str]) -> set[int]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; it is part of xlsa17")
    ids = {name: class_id for class_id, name in enumerate(names)}
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    unknown = [name for name in lines if name not in ids]
    if unknown:
        raise DataError(f"{file}: {unknown[0]!r} is not among allclasses_names of att_splits.mat")
    return {ids[name] for name in lines}


def _expect(file: Path, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise DataError(f"{file}: expected {expected} as {what}, found {found}; is this the original file?")


def _missing_message(missing: Sequence[str], needed: int, hint: str) -> str:
    named = "".join(f"\n  {path}" for path in missing[:MISSING_NAMED])
    more = f"\n  and {len(missing) - MISSING_NAMED} more" if len(missing) > MISSING_NAMED else ""
    return (
        f"{len(missing)} of {needed} listed photos are missing; complete the download, or go on without them by "
        f"data.allow_missing=true (--allow-missing). {f'{hint}. ' if hint else ''}Missing:{named}{more}"
    )
