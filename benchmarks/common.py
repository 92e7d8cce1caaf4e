"""What the benchmarks of data share: real photos, tables, memory of processes."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from svip.data.bundle import Bundle, BundleWriter
from svip.data.photos import decode
from svip.data.store import pixel_sha256

WORKERS, BATCH = 2, 64


def real_photos() -> list[Path]:
    """The CUB photos below $SVIP_SHARED, in order of their path."""
    folder = Path(os.environ.get("SVIP_SHARED", "../shared")) / "data" / "cub" / "CUB_200_2011" / "images"
    photos = sorted(folder.rglob("*.jpg"))
    if not photos:
        raise SystemExit(f"no photos below {folder}: set SVIP_SHARED")
    return photos


def write_bundle(folder: Path, photos: Sequence[Path], store_size: int) -> Bundle:
    """All photos as training images of one class."""
    classes = pd.DataFrame({"name": ["any", "other"], "role": ["train", "test_unseen"], "attribute": [0.0, 1.0]})
    with BundleWriter(folder) as writer:
        for photo in photos:
            writer.add(str(photo), 0, "train", decode(photo, store_size))
        return writer.finish(classes, {})


def sparse_bundle(folder: Path, count: int, height: int = 256, width: int = 341) -> Bundle:
    """``count`` black images of which the disk holds nothing; read as any other bundle's, through the page cache."""
    folder.mkdir()
    size = height * width * 3
    with open(folder / "images.bin", "wb") as file:
        file.truncate(count * size)
    split = pd.DataFrame({"path": [f"{row}.jpg" for row in range(count)], "class_id": 0, "role": "train"})
    split["offset"], split["height"], split["width"] = np.arange(count) * size, height, width
    split["sha256"] = pixel_sha256(np.zeros((height, width, 3), np.uint8))
    return Bundle(folder, {}, split, pd.DataFrame({"name": ["any"], "role": ["train"], "attribute": [0.0]}))


def best_of(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Each run's highest rate; they take turns, so that a busy moment of the machine hits all alike."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return {name: max(rates) for name, rates in results.items()}


def rate(count: int, run: Callable[[], object]) -> float:
    """Items a second."""
    start = time.perf_counter()
    run()
    return count / (time.perf_counter() - start)


def memory(pid: int) -> dict[str, float]:
    """Megabytes that a process has mapped: Rss; Pss, where shared pages are divided up; Uss, its own alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) / 1024 for name, value in (line.split(":") for line in lines)}
    return {"Rss": sizes["Rss"], "Pss": sizes["Pss"], "Uss": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; all columns but the first are numbers, set to the right."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(header) - 1), *lines[1:]]) + "\n"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file too")
    return parser


def publish(text: str, out: Path | None) -> None:
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")
