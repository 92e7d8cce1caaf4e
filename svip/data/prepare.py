"""The step prepare_data: from the original archives (or from nothing: synthetic) to a split bundle."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from svip.config import Config, ConfigError, DataConfig
from svip.data.apy import Box, Crop, cut
from svip.data.bundle import MISSING_NAMED, Bundle, BundleError, BundleWriter, DataError, read_bundle
from svip.data.catalog import CATALOG, attribute_file, photo_folder, xlsa17_folder
from svip.data.custom import read_custom
from svip.data.fetch import fetch
from svip.data.images import decode, resize, short_side
from svip.data.splits import Listing, Split, make_split, read_listing

log = logging.getLogger(__name__)

SETTINGS = ("dataset", "split", "fold", "val_seen_fraction", "store_size", "allow_missing", "seed")
"""Fields of DataConfig that shape the bundle of any photos; of one's own, ``unseen_fraction`` does too."""
CHUNK = 256
"""Photos decoded ahead of the writer; bounds the memory of packing."""


def prepare_data(config: Config, out: Path) -> Bundle:
    """Make the split bundle that ``config.data`` describes in the folder ``out``, and open it.

    Nothing is done when ``out`` already holds it (same settings, same listing, same photos by path and size).
    DataError for archives that are incomplete or not the original ones, and for unreadable photos (all are named).
    """
    data = config.data
    for key, dataset in {"like": "synthetic", "images": "custom", "attributes": "custom"}.items():
        if getattr(data, key) not in (None, "none") and data.dataset != dataset:
            raise ConfigError(f"data.{key} is for {dataset} data only, not for {data.dataset} (--dataset {dataset})")
    if data.dataset == "synthetic":
        # not needed, and so not loaded, for real data
        if data.like != "none":
            from svip.data.scale import write_scale

            return write_scale(data, out)
        from svip.data.synthetic import write_synthetic

        return write_synthetic(data, out)
    listing, photos = read_custom(data) if data.dataset == "custom" else _read_archives(data)
    sizes = np.array([_file_size(photos / listing.photo(path)) for path in listing.images["path"]])
    split = make_split(listing, data, sizes >= 0)
    info = {
        "dataset": data.dataset,
        "split": data.split,
        "fold": data.fold,
        "settings": {name: value for name, value in asdict(data).items() if name in _settings(data)},
        "source": _source(listing, sizes),
        "dropped_classes": split.dropped_classes,
    }
    done = _finished(out, info)
    if done is not None:
        log.info("%s already holds this bundle (%d images); nothing to do", out, len(done.split))
        return done
    return pack(split, photos, data, info, out)


def _read_archives(data: DataConfig) -> tuple[Listing, Path]:
    """What xlsa17 says of a real data set, and the folder below which its photos lie."""
    if data.root is None:
        raise DataError(f"data.root is not set; give the folder that holds the archives of {data.dataset} (--root)")
    spec, root = CATALOG[data.dataset], Path(data.root)
    if data.mirror:
        fetch(data.dataset, root, data.mirror)
    listing = read_listing(spec, xlsa17_folder(spec, root), attribute_file(spec, root))
    return listing, photo_folder(spec, root)


def _settings(data: DataConfig) -> tuple[str, ...]:
    return (*SETTINGS, "unseen_fraction") if data.dataset == "custom" else SETTINGS


def pack(split: Split, photos: Path, data: DataConfig, info: dict[str, Any], out: Path) -> Bundle:
    """Decode the split's photos below the folder ``photos`` and write the bundle; DataError names unreadable ones."""
    table = split.images
    crops = [split.crops.get(path, Crop(path)) for path in table["path"]]
    files = [photos / crop.photo for crop in crops]
    unreadable = []
    with BundleWriter(out) as writer:
        decoded = decode_all(files, data.store_size, [crop.box for crop in crops])
        progress = tqdm(decoded, total=len(files), desc="packing", unit="photo")
        for row, image in zip(table.itertuples(index=False), progress, strict=True):
            if isinstance(image, str):
                unreadable.append(f"{row.path} ({image})")
            elif not unreadable:
                writer.add(row.path, row.class_id, row.role, image)
        if unreadable:
            named = "".join(f"\n  {photo}" for photo in unreadable[:MISSING_NAMED])
            raise DataError(f"{len(unreadable)} photos below {photos} can't be decoded; fetch them again:{named}")
        return writer.finish(split.classes, info, missing=split.missing)


def decode_all(
    files: list[Path], store_size: int, boxes: Sequence[Box | None] | None = None
) -> Iterator[NDArray[np.uint8] | str]:
    """Per photo and in order: its pixels as ``decode`` gives them, or the part in its box; or what is wrong with it."""
    boxes = boxes or [None] * len(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), CHUNK):  # Pillow decodes and resamples outside the GIL: threads suffice
            chunk = slice(start, start + CHUNK)
            yield from pool.map(lambda file, box: _try_decode(file, store_size, box), files[chunk], boxes[chunk])


def _try_decode(file: Path, store_size: int, box: Box | None = None) -> NDArray[np.uint8] | str:
    try:
        if box is None:
            return decode(file, store_size)
        part = cut(decode(file, 0), box)
        height, width = part.shape[:2]
        return resize(part, *short_side(height, width, store_size)) if store_size else part
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error ...
        return str(error) or type(error).__name__


def _file_size(file: Path) -> int:
    """Bytes; -1 when there is no such file."""
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _source(listing: Listing, sizes: NDArray[np.int64]) -> dict[str, Any]:
    """What the bundle was made of, by content, so that a moved folder is still the same source."""
    images, folds = listing.images, (listing.train_classes, listing.val_classes)
    listed = zip(images["path"], images["class_id"], images["part"], strict=True)
    classes = zip(listing.class_names, listing.attributes.tolist(), strict=True)
    photos = zip(images["path"], sizes.tolist(), strict=True)
    crops = listing.crops.items()
    return {
        "listing_sha256": _digest([*listed, *classes, listing.attribute_names, *map(_sorted_sets, folds), *crops]),
        "photos_sha256": _digest(photos),
        **listing.origin,
    }


def _sorted_sets(classes: dict[int, set[int]]) -> list[list[int]]:
    return [sorted(classes[fold]) for fold in sorted(classes)]


def _digest(items: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item}\n".encode())
    return total.hexdigest()


def _finished(out: Path, info: dict[str, Any]) -> Bundle | None:
    """The bundle in ``out`` when it was made from the same source with the same settings."""
    try:
        bundle = read_bundle(out)
    except BundleError:
        return None
    same = all(bundle.info.get(key) == info[key] for key in ("settings", "source"))
    return bundle if same else None
