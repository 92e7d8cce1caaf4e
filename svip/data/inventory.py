"""What there is to fetch, and what of it lies under a root."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from svip.data.catalog import PACKAGES, DatasetSpec, Package, photo_folder, xlsa17_folder
from svip.data.errors import DataError
from svip.data.fetch import present
from svip.data.splits import proposed_split_version


def inventory(root: Path) -> list[dict[str, Any]]:
    """One entry a package, in plain types: what it is, and under ``here`` what lies below ``root`` (nothing is read but
    names, and xlsa17's small tables)."""
    return [_describe(package) | {"here": _here(package, root)} for package in PACKAGES.values()]


def _describe(package: Package) -> dict[str, Any]:
    archives = [{"name": archive.name, "size": archive.size, "urls": archive.urls} for archive in package.archives]
    about: dict[str, Any] = {
        "name": package.name,
        "archives": archives,
        "licence": package.licence,
        "citation": package.citation,
    }
    if isinstance(package, DatasetSpec):
        about |= {name: getattr(package, name) for name in ("images", "classes", "unseen_classes", "attributes")}
        about["seen_classes"] = package.classes - package.unseen_classes
    return about


def _here(package: Package, root: Path) -> dict[str, Any]:
    """archives: name -> what of it is there, and whether it was checked; of a data set also its photos and
    the version of its splits (None: not there)."""
    states = {}
    for there in present(package.name, root):
        checked, state = there.record is not None, "missing"
        if there.complete:
            state = "unpacked, checked" if checked else "content found, not checked"
        elif there.downloaded:
            state = "downloaded, checked" if checked else "archive found, not checked"
        states[there.archive.name] = state
    if not isinstance(package, DatasetSpec):
        return {"archives": states}
    return {"archives": states, "photos": _photos(package, root), "proposed_split": _version(package, root)}


def _photos(spec: DatasetSpec, root: Path) -> int:
    """JPEG files below the data set's folder; of aPY, on which several objects may lie."""
    try:
        folder = photo_folder(spec, root)
    except DataError:
        return 0
    return sum(name.lower().endswith((".jpg", ".jpeg")) for _, _, names in os.walk(folder) for name in names)


def _version(spec: DatasetSpec, root: Path) -> int | None:
    try:
        return proposed_split_version(xlsa17_folder(spec, root))
    except DataError:
        return None
