"""Data of a real data set's size, for load tests: its counts of classes, attributes and images, and simple pictures.

An attribute is one of six values of a part (``has_bako::temi``); a class has one dominant value of each part. A picture
shows each part as a patch in the dominant value's colour, over noise: drawn in milliseconds, and learnable.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from svip.config import ConfigError, DataConfig
from svip.data.bundle import Bundle, BundleWriter
from svip.data.catalog import CATALOG, DatasetSpec
from svip.data.errors import DataError
from svip.data.synthetic import drawn_info

log = logging.getLogger(__name__)

COLORS = np.array([(214, 40, 44), (246, 190, 40), (44, 164, 72), (42, 98, 220), (156, 62, 190), (235, 235, 230)])
"""Of the values of each part."""
LONGEST = 4 / 3
"""A picture's longer side over its shorter one is at most this."""
USUAL_SIZE = 256
"""What store_size=0 stands for."""
VECTOR_SIZE = 50
"""Length of the word vectors."""
AHEAD = 64
"""Pictures drawn ahead of the writer."""


@dataclass(frozen=True)
class Picture:
    """What one image is: its place in the bundle, and what it is drawn from."""

    class_id: int
    index: int
    role: str


def write_scale(config: DataConfig, out: Path) -> Bundle:
    """Draw a data set as large as ``config.like`` into a split bundle at ``out``, with word_vectors.txt.

    Size and time are logged beforehand. ConfigError for a split that it can't have, DataError where the disk is full.
    """
    if config.split != "standard":
        raise ConfigError(f"data.split={config.split!r}: synthetic data has only the standard split; use that")
    spec, size = CATALOG[config.like], config.store_size or USUAL_SIZE
    names = attribute_names(spec.attributes)
    class_roles = roles_of_classes(spec, config.fold)
    pictures = list(plan(spec, class_roles, config.val_seen_fraction))
    values, attributes = class_values(spec, config.seed)
    _announce(pictures, values, size, config.seed, out)
    with BundleWriter(out) as writer, ThreadPoolExecutor(_cores()) as pool:
        progress = tqdm(total=len(pictures), desc=f"drawing like {spec.name}", unit="image")
        for start in range(0, len(pictures), AHEAD):
            some = pictures[start : start + AHEAD]
            drawn = pool.map(lambda picture: draw(picture, values[picture.class_id], size, config.seed), some)
            for picture, image in zip(some, drawn, strict=True):
                path = f"{picture.class_id:03d}/{picture.index:04d}.png"
                writer.add(path, picture.class_id, picture.role, image)
            progress.update(len(some))
        progress.close()
        classes = pd.DataFrame(attributes, columns=names)
        classes.insert(0, "name", [f"class {class_id:03d}" for class_id in range(spec.classes)])
        classes.insert(1, "role", class_roles)
        return writer.finish(classes, drawn_info(config), {"word_vectors.txt": word_vectors(names)})


def plan(spec: DatasetSpec, class_roles: list[str], val_seen_fraction: float) -> Iterator[Picture]:
    """All images, class by class; each part of the split has the real data set's count, spread evenly over classes."""
    seen = spec.classes - spec.unseen_classes
    trainval, test_seen = _spread(spec.trainval, seen), _spread(spec.test_seen, seen)
    test_unseen = _spread(spec.test_unseen, spec.unseen_classes)
    for class_id, class_role in enumerate(class_roles):
        if class_role == "test_unseen":
            roles = ["test_unseen"] * test_unseen[class_id - seen]
        else:
            held_out = round(trainval[class_id] * val_seen_fraction) if class_role == "train" else 0
            roles = [class_role] * (trainval[class_id] - held_out) + ["val_seen"] * held_out
            roles += ["test_seen"] * test_seen[class_id]
        for index, role in enumerate(roles):
            yield Picture(class_id, index, role)


def roles_of_classes(spec: DatasetSpec, fold: int) -> list[str]:
    """The last classes are unseen; which of the seen ones are for validation is the fold's."""
    seen, first = spec.classes - spec.unseen_classes, (fold - 1) * spec.val_classes
    val = range(first, first + spec.val_classes)
    return ["val_unseen" if i in val else "train" for i in range(seen)] + ["test_unseen"] * spec.unseen_classes


def attribute_names(count: int) -> list[str]:
    """The values of part after part, the last of which may have fewer."""
    words = ["".join(syllables) for syllables in product(["ba", "ko", "temi", "lu", "sa", "ri", "no", "ve"], repeat=3)]
    values, parts = words[: len(COLORS)], words[len(COLORS) :]
    return list(islice((f"has_{part}::{value}" for part in parts for value in values), count))


def class_values(spec: DatasetSpec, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The dominant value of each part [C, P], and the class-attribute matrix [C, A]: high there and low elsewhere."""
    rng = np.random.default_rng([seed, spec.classes])
    parts = -(-spec.attributes // len(COLORS))
    high = np.minimum(len(COLORS), spec.attributes - len(COLORS) * np.arange(parts))  # how many values a part has
    values = rng.integers(0, high, (spec.classes, parts))
    matrix = rng.uniform(0, 0.2, (spec.classes, parts, len(COLORS)))
    matrix += np.eye(len(COLORS))[values] * rng.uniform(0.6, 0.8, (spec.classes, parts, 1))
    return values, matrix.reshape(spec.classes, -1)[:, : spec.attributes].astype(np.float32)


def draw(picture: Picture, values: NDArray[np.int64], size: int, seed: int) -> NDArray[np.uint8]:
    """One picture, uint8 [H, W, 3], its shorter side ``size``; it depends on nothing but its arguments."""
    rng = np.random.default_rng([seed, picture.class_id, picture.index])
    long = round(size * rng.uniform(1, LONGEST))
    height, width = (size, long) if rng.random() < 0.5 else (long, size)
    pixels = rng.integers(64, 192, (height, width, 3), np.uint8)
    side = int(size * rng.uniform(0.8, 0.95))
    grid = int(np.ceil(np.sqrt(len(values))))
    colors = np.full((grid * grid, 3), 128.0)
    colors[: len(values)] = COLORS[values]
    colors += rng.normal(0, 12, colors.shape)  # another light and hue each time
    patches = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8).reshape(grid, grid, 3))
    thing = np.asarray(patches.resize((side, side), Image.Resampling.NEAREST))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    place = pixels[top : top + side, left : left + side]
    place //= 4
    place += thing // 4 * 3
    return pixels


def word_vectors(names: list[str]) -> str:
    """GloVe-format text with the words of the attributes' names."""
    words = sorted({word for name in names for word in name.removeprefix("has_").split("::")})
    vectors = np.random.default_rng(VECTOR_SIZE).normal(size=(len(words), VECTOR_SIZE))
    lines = (f"{word} {' '.join(f'{x:.5f}' for x in vector)}" for word, vector in zip(words, vectors, strict=True))
    return "\n".join(lines) + "\n"


def _announce(pictures: list[Picture], values: NDArray[np.int64], size: int, seed: int, out: Path) -> None:
    """Log size and time, from a few pictures spread over all; DataError when the disk has no room."""
    some = pictures[:: max(len(pictures) // 16, 1)]
    start = perf_counter()
    sizes = [draw(picture, values[picture.class_id], size, seed).nbytes for picture in some]
    seconds = (perf_counter() - start) / len(some) * len(pictures) / _cores()
    needed = int(np.mean(sizes) * len(pictures))
    log.info("%d images, %.1f GB, about %.0f s", len(pictures), needed / 1e9, seconds)
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DataError(f"{parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed; give another --out")


def _cores() -> int:
    """Those that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0))


def _spread(total: int, classes: int) -> list[int]:
    return [total // classes + (i < total % classes) for i in range(classes)]
