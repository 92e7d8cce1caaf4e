"""From encoded photos to the pixels that a bundle stores; without PyTorch, so that tables need not wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What photos come in; Pillow's other readers start programs or are hardly ever used."""
MOST_PIXELS, LONGEST = 80_000_000, 20
"""Largest photo that is decoded, and its longest side over its shortest: a few bytes can claim any size."""
DECODER = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
"""What decoded pixels depend on besides the photo and the size; not on the machine."""


def decode(file: Path | BinaryIO, store_size: int) -> NDArray[np.uint8]:
    """Upright RGB pixels of an encoded photo, uint8 [H, W, 3], the shorter side ``store_size`` (0: original size)."""
    try:
        photo = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"expected a photo as {', '.join(FORMATS)}, whole and not empty") from None
    with photo:
        return upright(photo, store_size)


def upright(photo: Image.Image, store_size: int) -> NDArray[np.uint8]:
    """As ``decode``, of an open photo. ValueError for a size that is no photo's."""
    if photo.width * photo.height > MOST_PIXELS or max(photo.size) > LONGEST * min(photo.size):
        raise ValueError(
            f"{photo.width} x {photo.height} pixels: expected at most {MOST_PIXELS // 10**6} megapixels, and no side "
            f"more than {LONGEST} times the other"
        )
    photo.load()
    # where there is nothing to turn or to convert, Pillow would copy: a twentieth of the time of decoding
    if photo.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        photo = ImageOps.exif_transpose(photo)
    if photo.mode.startswith("I;16"):  # Pillow's own conversion would make all above 255 white
        photo = Image.fromarray((np.asarray(photo) >> 8).astype(np.uint8))
    elif photo.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {photo.mode} (32 bits): expected 8 or 16 bits a channel")
    if photo.mode != "RGB":
        photo = photo.convert("RGB")
    return np.asarray(_resized(photo, store_size) if store_size else photo)


def shrink(pixels: NDArray[np.uint8], store_size: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] to the shorter side ``store_size`` (0: as they are), as ``decode`` does."""
    return np.asarray(_resized(Image.fromarray(pixels), store_size)) if store_size else pixels


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) scaled so that the shorter side is ``size``, the longer rounded down as in torchvision."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _resized(photo: Image.Image, store_size: int) -> Image.Image:
    height, width = short_side(photo.height, photo.width, store_size)
    return photo.resize((width, height), Image.Resampling.BILINEAR)
