"""The step prepare_data: from the original archives (or from nothing: synthetic) to a split bundle."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from svip.config import Config, ConfigError, DataConfig
from svip.data.apy import Box, Crop, cut
from svip.data.bundle import MISSING_NAMED, Bundle, BundleError, BundleWriter, read_bundle
from svip.data.catalog import CATALOG, attribute_file, photo_folder, xlsa17_folder
from svip.data.custom import read_custom
from svip.data.errors import DataError
from svip.data.fetch import fetch
from svip.data.photos import DECODER, FORMATS, decode, short_side, shrink
from svip.data.splits import Listing, Split, make_split, read_listing
from svip.data.store import pixel_sha256

log = logging.getLogger(__name__)

SETTINGS = ("dataset", "split", "fold", "val_seen_fraction", "store_size", "allow_missing", "seed")
"""Fields of DataConfig that shape the bundle of any photos; of one's own, ``unseen_fraction`` does too."""
BATCH, AHEAD = 8, 2
"""Photos that a thread decodes in one go, and such batches a core ahead of the writer; they bound the memory."""
SAMPLE = 100
"""Photos whose size is looked at to estimate the size of the bundle."""


class Decoded(NamedTuple):
    """A photo's pixels, uint8 [H, W, 3], and their pixel_sha256."""

    pixels: NDArray[np.uint8]
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A bundle that can be made: what its bundle.json shall say, and how."""

    info: dict[str, Any]
    """dataset, split, fold, settings, source, and what else is known beforehand."""
    write: Callable[[Path], Bundle]

    def made(self, info: Mapping[str, Any]) -> bool:
        """Whether a bundle.json is that of a bundle from the same source with the same settings."""
        return all(info.get(key) == self.info[key] for key in ("settings", "source"))

    def make(self, out: Path, replace: bool = False) -> Bundle:
        """The bundle in the folder ``out``, which is written unless it is there.

        DataError where another whole bundle is there, unless that is to be replaced.
        """
        try:
            found = read_bundle(out)
        except BundleError:
            return self.write(out)
        if not self.made(found.info):
            if replace:
                return self.write(out)
            raise DataError(
                f"{out} holds another bundle ({self._differences(found.info)}); give another --out, or delete it first"
            )
        log.info("%s already holds this bundle (%d images); nothing to do", out, len(found.split))
        return found

    def _differences(self, info: Mapping[str, Any]) -> str:
        """What makes a bundle.json another one's: its settings, else its source."""
        there, here = info.get("settings", {}), self.info["settings"]
        names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if not names:
            return "of other photos or another listing"
        return ", ".join(f"data.{name}={there.get(name)} instead of {here.get(name)}" for name in names)


def prepare_data(config: Config, out: Path) -> Bundle:
    """Make the split bundle that ``config.data`` describes in the folder ``out``, and open it.

    Nothing is done when ``out`` already holds it: same settings, same listing, same photos by path and size (their
    content, which bundle.json has a hash of, is not read again). An interrupted call is taken up where it was.
    DataError for archives that are incomplete or not the original ones, and for unreadable photos (all are named).
    """
    return plan_bundle(config).make(out)


def plan_bundle(config: Config) -> Plan:
    """What ``prepare_data`` is going to make: archives are fetched where a mirror is set, and read but for photos."""
    data = config.data
    for key, dataset in {"like": "synthetic", "images": "custom", "attributes": "custom"}.items():
        if getattr(data, key) not in (None, "none") and data.dataset != dataset:
            raise ConfigError(f"data.{key} is for {dataset} data only, not for {data.dataset} (--dataset {dataset})")
    if data.mirror and data.dataset not in CATALOG:
        raise ConfigError(f"data.mirror={data.mirror}: there is nothing to fetch of {data.dataset} data")
    if data.dataset == "synthetic":
        # not needed, and so not loaded, for real data
        from svip.data.scale import write_scale
        from svip.data.synthetic import drawn_info, write_synthetic

        return Plan(drawn_info(data), partial(write_synthetic if data.like == "none" else write_scale, data))
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
    return Plan(info, partial(pack, split, photos, data, info))


def _read_archives(data: DataConfig) -> tuple[Listing, Path]:
    """What xlsa17 says of a real data set, and the folder below which its photos lie."""
    if data.root is None:
        raise DataError(
            f"data.root is not set; give the folder that holds the archives of {data.dataset} (--root), or an empty "
            "one and --mirror web to fetch them"
        )
    spec, root = CATALOG[data.dataset], Path(data.root)
    if data.mirror:
        fetch(data.dataset, root, data.mirror)
    listing = read_listing(spec, xlsa17_folder(spec, root), attribute_file(spec, root))
    return listing, photo_folder(spec, root)


def _settings(data: DataConfig) -> tuple[str, ...]:
    return (*SETTINGS, "unseen_fraction") if data.dataset == "custom" else SETTINGS


def pack(split: Split, photos: Path, data: DataConfig, info: dict[str, Any], out: Path) -> Bundle:
    """Decode the split's photos below the folder ``photos`` and write the bundle.

    DataError names unreadable photos; the others stay packed in the work folder, as after an interrupt.
    """
    table = split.images
    crops = {path: split.crops.get(path, Crop(path)) for path in table["path"]}
    origins = {
        path: [DECODER, data.store_size, (photos / crop.photo).stat().st_size, *(crop.box or ())]
        for path, crop in crops.items()
    }
    with BundleWriter(out, origins) as writer:
        paths = [path for path in table["path"] if path not in writer.stored]
        files = [photos / crops[path].photo for path in paths]
        _check_space(files, data.store_size, writer.path)
        decoded = decode_all(files, data.store_size, [crops[path].box for path in paths])
        progress = tqdm(decoded, initial=len(table) - len(paths), total=len(table), desc="packing", unit="photo")
        unreadable = []
        for path, photo in zip(paths, progress, strict=True):
            if isinstance(photo, str):
                unreadable.append(f"{path} ({photo})")
            else:
                writer.store(path, photo.pixels, sha256=photo.sha256)
        if unreadable:
            named = "".join(f"\n  {photo}" for photo in unreadable[:MISSING_NAMED])
            command = f", such as with `svip fetch {data.dataset} --root {data.root} --again`"
            raise DataError(
                f"{len(unreadable)} photos below {photos} can't be decoded; fetch them again"
                f"{command if data.dataset in CATALOG else ''} (the other {len(writer.stored)} stay packed):{named}"
            )
        for row in table.itertuples(index=False):
            writer.label(row.path, row.class_id, row.role)
        return writer.finish(split.classes, info | {"decoder": DECODER}, missing=split.missing)


def decode_all(files: list[Path], store_size: int, boxes: Sequence[Box | None] = ()) -> Iterator[Decoded | str]:
    """Per photo and in order: its pixels as ``decode`` gives them, or the part in its box; or what is wrong with it.

    Uses all cores.
    """
    photos = list(zip(files, boxes or [None] * len(files), strict=True))
    cores = len(os.sched_getaffinity(0))
    waiting: deque[Future[list[Decoded | str]]] = deque()
    with ThreadPoolExecutor(cores) as pool:  # Pillow decodes and resamples outside the GIL: threads suffice
        for start in range(0, len(photos), BATCH):
            batch = photos[start : start + BATCH]
            waiting.append(
                pool.submit(lambda batch: [_try_decode(file, store_size, box) for file, box in batch], batch)
            )
            if len(waiting) > AHEAD * cores:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _decode_batch(photos: Sequence[tuple[Path, Box | None]], store_size: int) -> list[Decoded | str]:
    return [_try_decode(file, store_size, box) for file, box in photos]


def _try_decode(file: Path, store_size: int, box: Box | None) -> Decoded | str:
    try:
        pixels = decode(file, 0 if box else store_size)
        if box:
            pixels = shrink(cut(pixels, box), store_size)
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error ...
        return str(error) or type(error).__name__
    return Decoded(pixels, pixel_sha256(pixels))


def _check_space(files: list[Path], store_size: int, out: Path) -> None:
    """DataError when the photos, to judge by some of them, need more than the disk has left."""
    sizes = []
    for file in files[:: max(1, len(files) // SAMPLE)]:
        try:
            with Image.open(file, formats=FORMATS) as photo:
                shape = short_side(photo.height, photo.width, store_size) if store_size else photo.size
        except Exception:  # named when all are decoded
            continue
        sizes.append(3 * shape[0] * shape[1])
    needed, free = len(files) * float(np.mean(sizes or [0])), shutil.disk_usage(out.parent).free
    if needed > free:
        raise DataError(
            f"{out}: {len(files)} photos take about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; "
            "make room, give another output folder, or choose a smaller data.store_size"
        )


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
