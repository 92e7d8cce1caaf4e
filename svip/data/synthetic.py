"""The embedded data set: toy birds over clutter, a real zero-shot task rendered from a seed in seconds.

A class is a unique combination of nameable attributes, one value of each group in ``GROUPS``; every value is seen in
training classes, so an unseen class is a new combination of known parts. Objects vary in pose, scale, place and shade;
each image keeps its object mask, so that the selection of patches can be scored against the truth.

``python -m svip.data.synthetic docs/figures/synthetic.png`` draws the picture in the README.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svip.config import ConfigError, DataConfig
from svip.data.bundle import Bundle, BundleWriter

TRAIN_CLASSES, VAL_CLASSES, UNSEEN_CLASSES = 40, 10, 10
"""Classes by role; train and validation classes are the seen ones at test time. Many train
classes with few images each show a value in many combinations, and so teach the value rather than the class."""
SEEN_CLASSES = TRAIN_CLASSES + VAL_CLASSES
CLASSES = SEEN_CLASSES + UNSEEN_CLASSES
TRAINVAL_IMAGES, TEST_SEEN_IMAGES, TEST_UNSEEN_IMAGES = 30, 8, 30
"""Images a class: of a seen one to train on and to test on, and of an unseen one; 2,200 in all."""
SMALLEST, USUAL_SIZE = 32, 64
"""Side of an image in pixels: the least at which patterns can be told apart, and what store_size=0 stands for."""
SUPERSAMPLING = 3
"""Images are drawn this many times larger and averaged down, for smooth edges."""
VECTOR_SIZE = 50
"""Length of the word vectors."""
SETTINGS = ("dataset", "split", "fold", "val_seen_fraction", "store_size", "seed")
"""Fields of DataConfig that shape the bundle; ``like`` too, where it is set."""

Description = dict[str, str]
"""Attribute group -> value: what a class looks like."""
Color = tuple[int, int, int]
Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]  # [P, 2] corners (x to the bill, y down), in units of the body's radius

COLORS: dict[str, Color] = {
    "red": (214, 40, 44),
    "orange": (246, 136, 28),
    "yellow": (250, 218, 50),
    "green": (44, 164, 72),
    "blue": (42, 98, 220),
    "purple": (156, 62, 190),
}
INK: Color = (34, 30, 38)
"""Bill, pattern and pupil."""
UNIT = {"small": 0.175, "medium": 0.22, "large": 0.265}
"""Radius of the body by size, as a share of the image's side."""
BILL = {"short": 0.4, "long": 1.0}
NECK = {"round": (0.85, -0.8), "long": (1.05, -0.6), "square": (0.85, -0.8), "triangular": (0.55, -0.95)}
"""Place of the head's centre by body shape."""
RUMP = {"round": (-0.8, 0.3), "long": (-1.05, 0.3), "square": (-0.8, 0.3), "triangular": (-0.75, 0.3)}
"""Place of the tail's root by body shape."""
GROUPS: dict[str, tuple[str, ...]] = {
    "body_shape": ("round", "long", "square", "triangular"),
    "body_color": tuple(COLORS),
    "wing_color": tuple(COLORS),
    "wing_pattern": ("plain", "striped", "spotted"),
    "head_color": tuple(COLORS),
    "head_pattern": ("plain", "crested"),
    "tail_shape": ("fan", "forked", "pointed"),
    "bill_length": tuple(BILL),
    "size": tuple(UNIT),
}
"""Attribute groups and their values; the tail has the wing's colour."""
PAIRS = [(group, value) for group, values in GROUPS.items() for value in values]
ATTRIBUTES = [f"has_{group}::{value}" for group, value in PAIRS]
SHADES = dict(zip(COLORS, ("Ruby", "Amber", "Golden", "Emerald", "Azure", "Violet"), strict=True))
TAIL_NAMES = {"fan": "Fantail", "forked": "Forktail", "pointed": "Spiketail"}


def write_synthetic(config: DataConfig, out: Path) -> Bundle:
    """Render the data set into a split bundle at ``out``, with ``word_vectors.txt`` for its attributes.

    ``fold`` chooses the validation classes and ``val_seen_fraction`` the share of each train class's images that is
    held out; neither changes a pixel. ConfigError for a split, a size or a seed that it can't have.
    """
    if config.split != "standard":
        raise ConfigError(f"data.split={config.split!r}: synthetic data has only the standard split; use that")
    if config.store_size and config.store_size < SMALLEST:
        raise ConfigError(f"data.store_size={config.store_size}: synthetic data needs at least {SMALLEST}, or 0")
    if config.seed < 0:
        raise ConfigError(f"data.seed={config.seed}: expected at least 0")
    size = config.store_size or USUAL_SIZE
    descriptions = class_descriptions(config.seed)
    class_roles = _class_roles(config.fold)
    with BundleWriter(out) as writer:
        for class_id, (description, class_role) in enumerate(zip(descriptions, class_roles, strict=True)):
            for index, role in enumerate(_image_roles(class_role, config.val_seen_fraction)):
                image, mask = render(description, np.random.default_rng((config.seed, class_id, index)), size)
                writer.add(f"{class_id:03d}/{index:03d}.png", class_id, role, image, mask)
        classes = _class_table(descriptions, class_roles)
        return writer.finish(classes, drawn_info(config), {"word_vectors.txt": word_vectors()})


def drawn_info(config: DataConfig) -> dict[str, Any]:
    """What bundle.json says of where drawn images come from, these or those of another data set's size."""
    like = config.like != "none"
    settings = {name: getattr(config, name) for name in (*SETTINGS, *(["like"] if like else []))}
    return {
        **{name: settings[name] for name in ("dataset", "split", "fold")},
        "settings": settings,
        "source": {"generator": "svip.data.scale" if like else "svip.data.synthetic"},
    }


def class_descriptions(seed: int) -> list[Description]:
    """The classes in order of class_id; the last UNSEEN_CLASSES are the unseen ones.

    Whatever the fold, each value of each group occurs in two training classes or more, and any two classes differ in
    four groups or more.
    """
    rng = np.random.default_rng((seed, CLASSES, 0))  # a class id that no image has
    classes: list[Description] = []
    while not _is_zero_shot_task(classes):
        classes, counts = [], Counter[tuple[str, str]]()
        while len(classes) < CLASSES:
            classes.append(max(_candidates(classes, rng), key=lambda item: _merit(item, classes, counts)))
            counts.update(classes[-1].items())
    return classes


def class_name(description: Mapping[str, str]) -> str:
    """Such as ``Ruby-winged Azure Forktail``; unique within the data set."""
    wing, body = SHADES[description["wing_color"]], SHADES[description["body_color"]]
    return f"{wing}-winged {body} {TAIL_NAMES[description['tail_shape']]}"


def _candidates(classes: list[Description], rng: np.random.Generator) -> Iterator[Description]:
    names = {class_name(item) for item in classes}
    for _ in range(64):
        item = {group: str(rng.choice(values)) for group, values in GROUPS.items()}
        # parts that touch must differ in colour, or neither has an outline
        if class_name(item) not in names and item["body_color"] not in (item["wing_color"], item["head_color"]):
            yield item


def _merit(item: Description, classes: list[Description], counts: Counter[tuple[str, str]]) -> tuple[int, float]:
    """Unlike the classes before (five groups apart is enough), then made of the rarer values."""
    apart = min((_distance(item, other) for other in classes), default=5)
    return min(apart, 5), -sum(counts[key, value] * len(GROUPS[key]) for key, value in item.items())


def _distance(one: Description, other: Description) -> int:
    return sum(one[group] != other[group] for group in GROUPS)


def _is_zero_shot_task(classes: list[Description]) -> bool:
    if len(classes) < CLASSES or any(
        _distance(one, other) < 4 for i, one in enumerate(classes) for other in classes[:i]
    ):
        return False
    for fold in (1, 2, 3):
        roles = _class_roles(fold)
        train = (item for item, role in zip(classes, roles, strict=True) if role == "train")
        counts = Counter(pair for item in train for pair in item.items())
        if any(counts[pair] < 2 for pair in PAIRS):
            return False
    return True


def _class_roles(fold: int) -> list[str]:
    first = (fold - 1) * VAL_CLASSES
    seen = ["val_unseen" if first <= i < first + VAL_CLASSES else "train" for i in range(SEEN_CLASSES)]
    return seen + ["test_unseen"] * UNSEEN_CLASSES


def _image_roles(class_role: str, val_seen_fraction: float) -> list[str]:
    """Role of each image of a class; images are independent draws, so the order needs no shuffling."""
    if class_role == "test_unseen":
        return ["test_unseen"] * TEST_UNSEEN_IMAGES
    held_out = round(TRAINVAL_IMAGES * val_seen_fraction) if class_role == "train" else 0
    return [class_role] * (TRAINVAL_IMAGES - held_out) + ["val_seen"] * held_out + ["test_seen"] * TEST_SEEN_IMAGES


def _class_table(descriptions: list[Description], roles: list[str]) -> pd.DataFrame:
    names = pd.DataFrame({"name": [class_name(item) for item in descriptions], "role": roles})
    matrix = np.array([[item[group] == value for group, value in PAIRS] for item in descriptions], np.float32)
    return pd.concat([names, pd.DataFrame(matrix, columns=ATTRIBUTES)], axis=1)


def word_vectors() -> str:
    """GloVe-format text with the words of ATTRIBUTES: words of a kind share a direction, and each has its own."""
    kinds: dict[str, set[str]] = {}
    for group, values in GROUPS.items():
        kinds.setdefault(group.split("_")[-1], set()).update(values)  # color, shape, pattern, length, size
        kinds.setdefault("part", set()).update(group.split("_")[:-1])
    kinds["property"] = set(kinds) - {"part"}
    rng = np.random.default_rng(VECTOR_SIZE)
    lines: dict[str, str] = {}
    for kind in sorted(kinds):
        shared = rng.normal(size=VECTOR_SIZE)
        for word in sorted(kinds[kind] - lines.keys()):
            vector = 0.5 * (shared + rng.normal(size=VECTOR_SIZE))
            lines[word] = " ".join([word, *(f"{value:.5f}" for value in vector)])
    return "\n".join(lines.values()) + "\n"


def render(description: Mapping[str, str], rng: np.random.Generator, size: int) -> tuple[Pixels, Pixels]:
    """One image of a class: RGB pixels, uint8 [size, size, 3], and its object mask, uint8 [size, size] of 0 and 1."""
    side = size * SUPERSAMPLING
    canvas = _background(rng, side)
    mask = Image.new("L", (side, side))
    draw, draw_mask = ImageDraw.Draw(canvas), ImageDraw.Draw(mask)
    parts = _parts(description, rng)
    place = _pose(np.concatenate([points for points, _ in parts]), UNIT[description["size"]] * side, side, rng)
    for points, color in parts:
        corners = [(float(x), float(y)) for x, y in place(points)]
        edge = tuple(int(0.55 * channel) for channel in color)
        draw.polygon(corners, fill=color, outline=edge, width=max(1, side // 100))
        draw_mask.polygon(corners, fill=255)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) * rng.uniform(0.85, 1.08)
    pixels += rng.normal(0, 3, pixels.shape)  # the camera's exposure and noise
    return np.clip(pixels, 0, 255).astype(np.uint8), (np.asarray(mask.reduce(SUPERSAMPLING)) > 127).astype(np.uint8)


def _pose(outline: Points, unit: float, side: int, rng: np.random.Generator) -> Callable[[Points], Points]:
    """Random mirroring, rotation, scale and place that keep the object in the picture: a map from units to pixels."""
    angle, scale = rng.uniform(-0.5, 0.5), unit * rng.uniform(0.94, 1.06)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    mirror = rng.choice([-1.0, 1.0])
    matrix = np.array([[mirror * cos, mirror * sin], [-sin, cos]])
    corners = outline @ matrix
    low, high = -corners.min(0), side - corners.max(0)
    # an object wider than the picture has low > high: it then loses something at either edge
    shift = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    return lambda points: points @ matrix + shift


def _parts(description: Mapping[str, str], rng: np.random.Generator) -> list[tuple[Points, Color]]:
    """The bird's parts from back to front, around the body's centre."""
    shape = description["body_shape"]
    body, wing, head = (_shade(COLORS[description[key]], rng, 10) for key in ("body_color", "wing_color", "head_color"))
    crest = [np.array([(x - 0.14, -0.35), (1.9 * x - 0.12, -1.22), (x + 0.14, -0.35)]) for x in (-0.3, 0.0, 0.3)]
    bill = np.array([(0.4, -0.24), (0.5 + BILL[description["bill_length"]], 0.1), (0.35, 0.3)])
    head_parts = [(points, head) for points in crest if description["head_pattern"] == "crested"]
    head_parts += [(bill, INK), (_ellipse(0.62, 0.6), head), (_ellipse(0.17, 0.17, 0.2, -0.1), (250, 250, 246))]
    head_parts += [(_ellipse(0.09, 0.09, 0.23, -0.1), INK)]
    return [
        (_TAILS[description["tail_shape"]] + RUMP[shape], wing),
        (_BODIES[shape], body),
        (_ellipse(0.78, 0.56, -0.18, 0.2), wing),
        *((points, INK) for points in _pattern(description["wing_pattern"])),
        *((points + NECK[shape], color) for points, color in head_parts),
    ]


def _ellipse(rx: float, ry: float, x: float = 0.0, y: float = 0.0, power: float = 1.0) -> Points:
    """Corners of an ellipse; a power below 1 swells it towards its bounding box."""
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([x + rx * np.sign(cos) * abs(cos) ** power, y + ry * np.sign(sin) * abs(sin) ** power], 1)


_ARC = np.linspace(-0.85, 0.85, 9)
_BODIES: dict[str, Points] = {
    "round": _ellipse(1.1, 1.1),
    "long": _ellipse(1.45, 0.84),
    "square": _ellipse(1.08, 1.08, power=0.25),
    "triangular": np.array([(0.22, -1.3), (0.5, -1.3), (1.3, 0.75), (1.2, 0.95), (-1.3, 0.95), (-1.4, 0.75)]),
}
_TAILS: dict[str, Points] = {
    "fan": np.concatenate([[(0.3, 0.0)], np.stack([-1.1 * np.cos(_ARC), 1.15 * np.sin(_ARC)], 1)]),
    "forked": np.array([(0.3, -0.35), (-1.25, -0.85), (-0.35, 0.0), (-1.25, 0.85), (0.3, 0.35)]),
    "pointed": np.array([(0.3, -0.4), (-1.5, 0.0), (0.3, 0.4)]),
}


def _pattern(pattern: str) -> list[Points]:
    """Ink on the wing: three bars, or six spots, or none."""
    if pattern == "striped":
        heights = {-0.6: 0.38, -0.18: 0.54, 0.24: 0.46}
        return [
            np.array([(x, 0.2 - y), (x + 0.18, 0.2 - y), (x + 0.18, 0.2 + y), (x, 0.2 + y)]) for x, y in heights.items()
        ]
    spots = ((-0.62, 0.2), (-0.34, -0.06), (-0.34, 0.46), (-0.04, 0.2), (0.26, -0.06), (0.26, 0.46))
    return [_ellipse(0.14, 0.14, x, y) for x, y in spots if pattern == "spotted"]


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """Muted clutter: blotches, strokes, dull shapes, and now and then a small bright one."""
    earth = np.array([rng.uniform(95, 150), rng.uniform(95, 145), rng.uniform(80, 120)])
    coarse = earth + rng.normal(0, 16, (5, 5, 1)) + rng.normal(0, 6, (5, 5, 3))
    canvas = _upscale(np.asarray(_upscale(coarse, 24)) + rng.normal(0, 9, (24, 24, 1)), side)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(8, 15)):
        ends = rng.uniform(0, side, 2) + np.array([(0, 0), rng.normal(0, 0.25 * side, 2)])
        draw.line([(float(x), float(y)) for x, y in ends], _shade(earth, rng, 24), int(rng.integers(2, side // 24)))
    for bright in (False,) * rng.integers(3, 6) + (True,) * rng.integers(0, 3):
        radius = side * (rng.uniform(0.025, 0.045) if bright else rng.uniform(0.06, 0.14))
        color = _shade(COLORS[str(rng.choice(list(COLORS)))], rng, 10) if bright else _shade(earth, rng, 30)
        x, y = rng.uniform(0, side, 2)
        draw.regular_polygon((x, y, radius), int(rng.choice([3, 4, 5, 24])), int(rng.integers(360)), fill=color)
    return canvas


def _upscale(pixels: NDArray[np.float64], side: int) -> Image.Image:
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _shade(color: Color | NDArray[np.float64], rng: np.random.Generator, spread: float) -> Color:
    """A colour near this one: mostly lighter or darker, with a little change of hue."""
    red, green, blue = np.clip(np.asarray(color) + rng.normal(0, spread) + rng.normal(0, spread / 4, 3), 0, 255)
    return int(red), int(green), int(blue)


def draw_figure(path: Path, seed: int = 0) -> None:
    """Draw examples of four seen and two unseen classes, with the object mask outlined in the last column."""
    zoom, columns, left, gap = 3, 5, 216, 6
    side = USUAL_SIZE * zoom
    descriptions = class_descriptions(seed)
    chosen = [0, 1, 2, 3, SEEN_CLASSES, SEEN_CLASSES + 1]
    sheet = Image.new("RGB", (left + columns * (side + gap), len(chosen) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, class_id in enumerate(chosen):
        top = gap + row * (side + gap)
        _label(draw, 12, top + 8, descriptions[class_id], class_id < SEEN_CLASSES)
        for index in range(columns):
            image, mask = render(descriptions[class_id], np.random.default_rng((seed, class_id, index)), USUAL_SIZE)
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            if index == columns - 1:
                large = mask.repeat(zoom, 0).repeat(zoom, 1).astype(bool)
                inner = np.pad(large, 3)
                inner = np.all([np.roll(inner, (y, x), (0, 1)) for y in (-3, 3) for x in (-3, 3)], 0)[3:-3, 3:-3]
                pixels = np.where(large[..., None], np.asarray(tile), np.asarray(tile) // 3)
                tile = Image.fromarray(np.where((large & ~inner)[..., None], 255, pixels).astype(np.uint8))
            sheet.paste(tile, (left + index * (side + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
    os.replace(temporary, path)


def _label(draw: ImageDraw.ImageDraw, x: int, y: int, item: Description, seen: bool) -> None:
    attributes = "\n".join(f"{group.replace('_', ' ')}: {value}" for group, value in item.items())
    kind, ink = ("seen class", (70, 110, 70)) if seen else ("unseen class", (176, 40, 40))
    draw.text((x, y), class_name(item).replace(" ", "\n", 1), "black", ImageFont.load_default(19))
    draw.text((x, y + 50), kind, ink, ImageFont.load_default(15))
    draw.text((x, y + 72), attributes, (90, 90, 90), ImageFont.load_default(12), spacing=0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svip.data.synthetic PICTURE.png")
    draw_figure(Path(sys.argv[1]))
