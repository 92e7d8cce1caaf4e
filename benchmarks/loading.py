"""The loader against the usual data set that opens a file an image, with the same transforms and as many workers."""

from __future__ import annotations

import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import (
    BATCH,
    WORKERS,
    arguments,
    best_of,
    markdown,
    memory,
    publish,
    rate,
    real_photos,
    sparse_bundle,
    write_bundle,
)
from svip.config import DataConfig
from svip.data.bundle import Bundle
from svip.data.images import EpochBatches, ImageDataset, loader

DRAWN = 20_000
"""Images that are read of each bundle to compare their sizes."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPARE = [transforms.Resize(256), transforms.CenterCrop(224)]
FLIP = transforms.RandomHorizontalFlip()
VIEWS: dict[str, tuple[bool, str, list[torch.nn.Module]]] = {
    "test, all presets: centre crop": (False, "center", PREPARE),
    "train, CUB: centre crop, flip": (True, "center", [*PREPARE, FLIP]),
    "train, AwA2: squash, flip": (True, "squash", [transforms.Resize((224, 224)), FLIP]),
    "train, SUN: random resized crop, flip": (True, "random_crop", [transforms.RandomResizedCrop(224), FLIP]),
}
"""Which view -> ours (train or not, its name), and the same in torchvision's words."""


class Files(Dataset[torch.Tensor]):
    """As in most repositories of the field: open, decode and transform a file for each image, each time."""

    def __init__(self, photos: list[Path], steps: list[torch.nn.Module]) -> None:
        self.photos = photos
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.photos[index]) as photo:
            return torch.as_tensor(self.transform(photo.convert("RGB")))


class Unreleased(Bundle):
    """Keeps all that was read in the process's resident memory."""

    def release(self, row: int) -> None:
        pass


def read_files(photos: list[Path], steps: list[torch.nn.Module]) -> float:
    batches = DataLoader(Files(photos, steps), BATCH, shuffle=True, num_workers=WORKERS)
    return rate(len(photos), lambda: sum(len(images) for images in batches))


def read_bundle(
    bundle: Bundle, train: bool, view: str, normalize: bool = False, rows: NDArray[np.int64] | None = None
) -> float:
    data = DataConfig(train_view=view, test_view=view if view == "squash" else "center")
    dataset = ImageDataset(bundle, np.arange(len(bundle.split)) if rows is None else rows, data, train, seed=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))

    def run() -> None:
        for images, _, _ in loader(dataset, EpochBatches(len(dataset), BATCH, 0, 0), WORKERS):
            if normalize:
                images.float().sub_(mean).div_(std)

    return rate(len(dataset), run)


def throughput(folder: Path, photos: list[Path], rounds: int) -> str:
    bundle = write_bundle(folder / "cub", photos, 256)
    rows = []
    for name, (train, view, steps) in VIEWS.items():
        runs = {
            "files": partial(read_files, photos[:: max(1, len(photos) // 2000)], steps),
            "bundle": partial(read_bundle, bundle, train, view),
            "normalised": partial(read_bundle, bundle, train, view, normalize=True),
        }
        rates = best_of(rounds, runs)
        ratios = (f"{rates[key] / rates['files']:.1f}" for key in ("bundle", "normalised"))
        rows.append([name, *(f"{value:,.0f}" for value in rates.values()), *(f"**{ratio}**" for ratio in ratios)])
    pixels = np.zeros((BATCH, 3, 224, 224), np.uint8)
    floor = max(rate(BATCH, pixels.copy) for _ in range(20))
    return (
        f"Images a second, {WORKERS} workers, batches of {BATCH}, {len(photos):,} CUB photos stored at 256 px:\n\n"
        + markdown(("view", "file an image", "bundle", "... normalised on this CPU", "ratio", "... normalised"), rows)
        + f"\nThe floor, one process that copies as many bytes and does nothing else: {floor:,.0f} images/s.\n"
    )


def worker_memory(bundle: Bundle) -> dict[str, float]:
    """The largest of each number over the workers, at the end of an epoch."""
    dataset = ImageDataset(bundle, np.arange(len(bundle.split)), DataConfig(), train=False, seed=0)
    batches = EpochBatches(len(dataset), BATCH, 0, 0)
    for number, _ in enumerate(loader(dataset, batches, WORKERS), 1):
        if number == len(batches) - 2 * WORKERS:  # the workers end as soon as nothing is left to do
            sizes = [memory(child.pid) for child in multiprocessing.active_children() if child.pid]
    return {key: max(size[key] for size in sizes) for key in ("Rss", "Pss", "Uss")}


def scale(folder: Path, rounds: int) -> str:
    runs = {}
    for count in (1_000, 10_000, 40_000):
        bundle = sparse_bundle(folder / str(count), count)
        drawn = np.random.default_rng(0).integers(count, size=DRAWN)
        runs[f"{count:,}"] = partial(read_bundle, bundle, True, "center", rows=drawn)
    rates = best_of(rounds, runs)
    rows = [[name, f"{1e6 / value:.0f}"] for name, value in rates.items()]
    sun = sparse_bundle(folder / "sun", 14_340)
    sizes = [
        [name, *(f"{value:.0f}" for value in worker_memory(bundle).values())]
        for name, bundle in {
            "pages given back": sun,
            "pages kept": Unreleased(sun.path, sun.info, sun.split, sun.classes),
        }.items()
    ]
    gigabytes = (sun.path / "images.bin").stat().st_size / 1e9
    return (
        f"Memory of one worker in MB at SUN's size (14,340 images, {gigabytes:.1f} GB of pixels):\n\n"
        + markdown(("a worker's pages of the store", "RSS", "PSS", "USS"), sizes)
        + "\nMicroseconds an image (train, CUB's view), images of 256 x 341 pixels in the page cache:\n\n"
        + markdown(("images in the bundle", "us an image"), rows)
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = scale(Path(folder), given.rounds)  # first: forked workers have all that this process ever loaded
        text = throughput(Path(folder), real_photos(), given.rounds)
    publish(f"{text}\n{sizes}", given.out)


if __name__ == "__main__":
    main()
