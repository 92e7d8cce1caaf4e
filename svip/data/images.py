"""From stored images to batches: views and augmentation, the order of an epoch, the loader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from svip.config import DataConfig
from svip.data.bundle import Bundle
from svip.data.photos import short_side

Item = tuple[int, int]
"""What a batch sampler asks for: epoch, and position in the data set."""

CROP_SCALE = (0.08, 1.0)
"""Area of a random crop as a share of the image's, uniform."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop, log-uniform."""
CROP_ATTEMPTS = 10


class ImageDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """Views of some images of a bundle, S = data_config.image_size.

    ``dataset[epoch, position]`` -> (image uint8 [3, S, S], class id, row of the bundle), where ``position`` counts
    within ``rows``. Augmentation (``train`` only) depends on (seed, epoch, row) alone, hence not on the number of
    workers or processes, nor on where a run was resumed.
    """

    def __init__(
        self, bundle: Bundle, rows: NDArray[np.int64], data_config: DataConfig, train: bool, seed: int
    ) -> None:
        self.bundle = bundle
        self.rows = np.asarray(rows, np.int64)
        self.class_ids = bundle.split["class_id"].to_numpy(np.int64)[self.rows]
        self.size = data_config.image_size
        self.view = data_config.train_view if train else data_config.test_view
        self.flip = train and data_config.flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: Item) -> tuple[torch.Tensor, int, int]:
        epoch, position = item
        row = int(self.rows[position])
        image = self.bundle.image(row)
        generator = np.random.default_rng([self.seed, epoch, row])
        mirror = self.flip and generator.random() < 0.5
        if self.view == "random_crop":
            image = random_crop(image, self.size, generator)
        else:
            image = square(image, self.size, self.view)
        if mirror:
            image = image[:, ::-1]
        # numpy copies into this order seven times faster than torch, and a copy it must be: the store is read-only
        pixels = np.array(image.transpose(2, 0, 1), order="C")  # [3, S, S]
        self.bundle.release(row)
        return torch.from_numpy(pixels), int(self.class_ids[position]), row


def square(image: NDArray[np.uint8], size: int, view: str) -> NDArray[np.uint8]:
    """The view ``center`` or ``squash`` of a stored image [H, W, 3], uint8 [size, size, 3]."""
    return resize(image, size, size) if view == "squash" else center(image, size)


def center(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square, uint8 [size, size, 3], of an image [H, W, 3]; a view.

    Only an image with a side below ``size`` is resampled first (its shorter side to ``size``).
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        image = resize(image, *short_side(height, width, size))
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def random_crop(image: NDArray[np.uint8], size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A random part of the image (area 8-100 %, ratio 3:4-4:3) resized to uint8 [size, size, 3].

    When ten draws do not fit into the image, the largest central part with an allowed ratio is taken.
    """
    height, width = image.shape[:2]
    for _ in range(CROP_ATTEMPTS):
        area = height * width * generator.uniform(*CROP_SCALE)
        ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            break
    else:
        w = min(width, round(height * CROP_RATIO[1]))
        h = min(height, round(width / CROP_RATIO[0]))
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], size, size)


def resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Antialiased bilinear resampling of uint8 [H, W, 3] to [height, width, 3].

    Twice as fast as Pillow's, from which one value in a hundred differs, by 1 or 2; the same on every CPU.
    """
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last in memory
    resized = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


class EpochBatches(Sampler[list[Item]]):
    """The batches of one epoch, as lists of (epoch, position).

    All processes draw the same permutation of 0..count-1 from (seed, epoch) and cut it into global batches of
    ``batch_size``; process ``rank`` of ``world`` gets every world-th item of each. The last global batch may be
    smaller: a process for which it has nothing left gets its first item, and ``sizes`` says that this does not count.
    Without ``reshuffle`` every epoch has the order of the first. ``start_batch`` leaves out that many global batches at
    the front, exactly as if they had run.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        world: int = 1,
        start_batch: int = 0,
        shuffle: bool = True,
        reshuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < world or batch_size < world:
            raise ValueError(f"expected 0 <= rank < world <= batch_size, found {rank}, {world}, {batch_size}")
        self.count, self.batch_size = count, batch_size
        self.seed, self.epoch = seed, epoch
        self.rank, self.world = rank, world
        self.start_batch, self.shuffle, self.drop_last = start_batch, shuffle, drop_last
        self.order_epoch = epoch if reshuffle else 0

    def _starts(self) -> range:
        """Where each global batch starts."""
        stop = self.count - self.count % self.batch_size if self.drop_last else self.count
        return range(self.start_batch * self.batch_size, stop, self.batch_size)

    def sizes(self, batch: int) -> tuple[int, int]:
        """How many images of a global batch (from 0) are this process's, and how many it has."""
        whole = min(self.batch_size, self.count - batch * self.batch_size)
        return len(range(self.rank, whole, self.world)), whole

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[Item]]:
        order = np.arange(self.count)
        if self.shuffle:
            # mixed: seed + epoch alone would give run 1's epoch 0 the order of run 0's epoch 1
            mixed = int(
                np.random.SeedSequence([self.seed, self.order_epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1)
            )
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mixed)).numpy()
        for start in self._starts():
            batch = order[start : start + self.batch_size]
            own = batch[self.rank :: self.world].tolist() or batch[:1].tolist()
            yield [(self.epoch, position) for position in own]


def loader(
    dataset: ImageDataset, batches: EpochBatches, workers: int
) -> DataLoader[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Loads those batches in order: images uint8 [B, 3, S, S], class ids int64 [B], rows int64 [B]."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # DataLoader collates the samples it is declared to yield
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # each iterator draws a seed: from the global generator, a resumed epoch would shift the model's dropout
        generator=torch.Generator(),
    )
