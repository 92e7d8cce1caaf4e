"""aPY's images are objects: each is cut out of its photo by its box, and one photo may show several.

xlsa17 names only the photos. Its order is that of the authors' three lists one after the other, which is what joins an
image to its box; ``read_objects`` checks file and class of each, so another order is refused and never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svip.data.errors import DataError

VOC = "VOCdevkit/VOC2008/JPEGImages"
LISTS = {"apascal_train.txt": VOC, "apascal_test.txt": VOC, "ayahoo_test.txt": "ayahoo_test_images"}
"""The lists in attribute_data, in xlsa17's order, and where the photos of each are, both below aPY's folder."""
FIELDS = 6 + 64
"""Fields of a line: file, class, left, top, right, bottom (pixels, counted from 1), and a bit an attribute."""
NARROWEST = 8
"""A box's longer side over its shorter; a narrower one is widened, or resizing would blow its longer side up."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, right and bottom excluded."""


@dataclass(frozen=True)
class Crop:
    """A part of a photo that is an image of its own."""

    photo: str
    """Path of the photo."""
    box: Box | None = None
    """None: all of it."""


def read_objects(folder: Path, image_files: Sequence[str]) -> tuple[dict[str, Crop], list[str]]:
    """All objects by path (``PHOTO#N``: the N-th of its photo), in xlsa17's order, and the class of each.

    ``folder`` is attribute_data; ``image_files`` are xlsa17's. DataError names the first line that is not as it must
    be, or that is not of xlsa17's photo.
    """
    crops: dict[str, Crop] = {}
    classes: list[str] = []
    count: Counter[str] = Counter()
    for name, place in LISTS.items():
        for number, line in enumerate(_lines(folder / name), start=1):
            where = f"{folder / name}, line {number}"
            file, class_name, *fields = line.split()
            if len(fields) != FIELDS - 2 or not all(field.lstrip("-").isdigit() for field in fields):
                raise DataError(f"{where}: expected a file, a class and {FIELDS - 2} whole numbers; fetch it again")
            listed = image_files[len(classes)] if len(classes) < len(image_files) else "nothing more"
            if listed.replace("\\", "/").rsplit("/", 1)[-1] != file:
                raise DataError(f"{where}: {file}, but res101.mat lists {listed} there; the two are not of one release")
            left, top, right, bottom = map(int, fields[:4])
            photo = f"{place}/{file}"
            count[photo] += 1
            crops[f"{photo}#{count[photo]}"] = Crop(photo, (left - 1, top - 1, right, bottom))
            classes.append(class_name)
    if len(classes) != len(image_files):
        raise DataError(f"{folder}: {len(classes)} objects, but res101.mat lists {len(image_files)}")
    return crops, classes


def cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """The part of a photo [H, W, 3] in the box, a view.

    What of the box lies outside of the photo is left out; a box without an area (aYahoo has one) is the whole photo.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.clip(box, 0, (width, height, width, height)).tolist()
    if left >= right or top >= bottom:
        return pixels
    least = max(right - left, bottom - top) // NARROWEST
    return pixels[_widen(top, bottom, least, height), _widen(left, right, least, width)]


def _widen(start: int, stop: int, least: int, limit: int) -> slice:
    """``start:stop``, or about its middle as many pixels as needed, inside 0..limit."""
    size = min(max(stop - start, least), limit)
    start = min(max((start + stop - size) // 2, 0), limit - size)
    return slice(start, start + size)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(f"{file} does not exist; it is part of attribute_data.tar.gz (`svip fetch apy`)")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
