"""Stores of images read by the same loader, and decoders of photos: what the choice of both rests on."""

from __future__ import annotations

import importlib.util
import io
import mmap
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import io as torchvision_io

from benchmarks.common import BATCH, WORKERS, arguments, best_of, markdown, memory, publish, rate, real_photos
from svip.data.images import center
from svip.data.photos import decode, short_side

Pixels = NDArray[np.uint8]
SIZE, STORED, QUALITY = 224, 256, 95
SKIPPED = [name for name in ("simplejpeg", "webdataset") if importlib.util.find_spec(name) is None]


def pillow(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as photo:
        return np.asarray(photo.convert("RGB"))


def torchvision(content: bytes) -> Pixels:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    decoded = torchvision_io.decode_jpeg(encoded, mode=torchvision_io.ImageReadMode.RGB)
    return np.asarray(decoded.permute(1, 2, 0))


def simplejpeg(content: bytes) -> Pixels:
    import simplejpeg as library

    return np.asarray(library.decode_jpeg(content))


DECODERS = {name.__name__: name for name in (pillow, torchvision, simplejpeg) if name.__name__ not in SKIPPED}


def view(image: Pixels) -> torch.Tensor:
    """The centre crop as the model gets it, uint8 [3, SIZE, SIZE]."""
    return torch.from_numpy(np.array(center(image, SIZE).transpose(2, 0, 1), order="C"))


class Stored(Dataset[torch.Tensor]):
    """Views of the images that ``open_store`` gives access to; opened in each worker."""

    def __init__(self, count: int, open_store: Callable[[], Callable[[int], Pixels]]) -> None:
        self.count, self.open_store = count, open_store
        self.read: Callable[[int], Pixels] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read = self.read or self.open_store()
        return view(self.read(index))


class Shards(IterableDataset[torch.Tensor]):
    """A webdataset: tar files, which can only be read from the first to the last image."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[torch.Tensor]:
        import webdataset

        shards = webdataset.SimpleShardList(self.files)
        parts = (shards, webdataset.split_by_worker, webdataset.tarfile_to_samples(), webdataset.shuffle(1000))
        return (view(pillow(sample["jpg"])) for sample in webdataset.DataPipeline(*parts))


def write_stores(folder: Path, photos: list[Path]) -> dict[str, tuple[Dataset[torch.Tensor], int]]:
    """Name -> data set, bytes on disk."""
    images = [decode(photo, STORED) for photo in photos]
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=QUALITY)
        encoded.append(file.getvalue())
    count = len(photos)
    shapes = [image.shape for image in images]

    raw = folder / "images.bin"
    raw.write_bytes(b"".join(image.tobytes() for image in images))
    starts = np.cumsum([0, *(image.size for image in images)]).tolist()

    def open_raw() -> Callable[[int], Pixels]:
        pixels = mapped(raw)
        return lambda i: np.frombuffer(pixels, np.uint8, starts[i + 1] - starts[i], starts[i]).reshape(shapes[i])

    arrow = folder / "images.arrow"
    schema = pa.schema([("pixels", pa.large_binary())])
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, count, 256):
            batch = [image.tobytes() for image in images[start : start + 256]]
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_binary())], schema))

    def open_arrow() -> Callable[[int], Pixels]:
        table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all().column("pixels")
        return lambda i: np.frombuffer(table[i].as_buffer(), np.uint8).reshape(shapes[i])

    packed = folder / "jpegs.bin"
    packed.write_bytes(b"".join(encoded))
    ends = np.cumsum([0, *map(len, encoded)]).tolist()

    def open_packed(decoder: Callable[[bytes], Pixels]) -> Callable[[int], Pixels]:
        content = mapped(packed)
        return lambda i: decoder(content[ends[i] : ends[i + 1]])

    stores: dict[str, tuple[Dataset[torch.Tensor], int]] = {
        "raw pixels, mapped": (Stored(count, open_raw), raw.stat().st_size),
        "Arrow IPC of raw pixels, mapped": (Stored(count, open_arrow), arrow.stat().st_size),
    }
    for name, decoder in DECODERS.items():
        data = Stored(count, partial(open_packed, decoder))
        stores[f"JPEGs in one file, mapped; {name}"] = data, packed.stat().st_size
    if "webdataset" not in SKIPPED:
        stores["webdataset of JPEGs (in sequence only); pillow"] = write_shards(folder, encoded)
    opened = Stored(count, lambda: lambda i: decode(photos[i], STORED))
    stores["a file an image, original size; pillow"] = opened, sum(photo.stat().st_size for photo in photos)
    return stores


def write_shards(folder: Path, encoded: list[bytes]) -> tuple[Dataset[torch.Tensor], int]:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=len(encoded) // 8 + 1, verbose=0) as sink:
        for number, content in enumerate(encoded):
            sink.write({"__key__": f"{number:05}", "jpg": content})
    files = sorted(folder.glob("*.tar"))
    return Shards(list(map(str, files))), sum(file.stat().st_size for file in files)


def mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read(dataset: Dataset[torch.Tensor], count: int, private: list[float]) -> float:
    """Images a second; notes the private memory of the larger worker, in MB."""
    order = None if isinstance(dataset, IterableDataset) else True
    batches = DataLoader(dataset, BATCH, shuffle=order, num_workers=WORKERS)

    def run() -> None:
        for number, _ in enumerate(batches):
            if number == count // BATCH // 2:
                pids = [child.pid for child in multiprocessing.active_children() if child.pid]
                private.append(max(memory(pid)["Uss"] for pid in pids))

    return rate(count, run)


def store_table(folder: Path, photos: list[Path], rounds: int) -> str:
    stores = write_stores(folder, photos)
    private: dict[str, list[float]] = {name: [] for name in stores}
    runs = {name: partial(read, data, len(photos), private[name]) for name, (data, _) in stores.items()}
    rates = best_of(rounds, runs)
    rows = [
        [name, f"{rates[name]:,.0f}", f"{size / len(photos) / 1e3:,.0f}", f"{max(private[name]):.0f}"]
        for name, (_, size) in stores.items()
    ]
    return (
        f"{len(photos):,} CUB photos stored at {STORED} px (JPEG quality {QUALITY}), delivered as {SIZE} px uint8 by "
        f"{WORKERS} workers:\n\n" + markdown(("store", "images/s", "kB an image", "private MB a worker"), rows)
    )


def drafted(content: bytes) -> Pixels:
    """JPEG decoded at a half, quarter or eighth while that leaves twice the size: Pillow's thumbnail does so."""
    with Image.open(io.BytesIO(content)) as photo:
        photo.draft(None, (2 * STORED, 2 * STORED))
        return np.asarray(photo.convert("RGB"))


def shrunk(decoder: Callable[[bytes], Pixels], content: bytes) -> Pixels:
    pixels = decoder(content)
    height, width = short_side(pixels.shape[0], pixels.shape[1], STORED)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def decoder_table(photos: list[Path], rounds: int) -> str:
    small = [photo.read_bytes() for photo in photos[:: len(photos) // 100]]
    kinds = {
        "227 x 227": small,
        "500 x 400": enlarged(small, 500, 400),
        "2000 x 1500": enlarged(small[:20], 2000, 1500),
    }
    ways: dict[str, Callable[[bytes], Pixels]] = {"svip.data.photos.decode": lambda c: decode(io.BytesIO(c), STORED)}
    ways |= {name: partial(shrunk, decoder) for name, decoder in DECODERS.items()}
    ways["pillow with draft"] = partial(shrunk, drafted)
    rows: list[list[Any]] = [[name] for name in ways]
    for contents in kinds.values():
        runs = {name: partial(rate, len(contents), partial(_all, way, contents)) for name, way in ways.items()}
        rates = best_of(rounds, runs)
        right = [decode(io.BytesIO(content), STORED).astype(int) for content in contents]
        for row, (name, way) in zip(rows, ways.items(), strict=True):
            off = np.mean([np.abs(way(c) - pixels).mean() for c, pixels in zip(contents, right, strict=True)])
            row += [f"{rates[name]:,.0f}", f"{off:.2f}"]
    header = [""] + [text for kind in kinds for text in (f"{kind}: photos/s", "off by")]
    return (
        f"Photos to a shorter side of {STORED} on one core; off by: mean difference of a value (0-255) from ours:\n\n"
        + markdown(header, rows)
    )


def _all(way: Callable[[bytes], Pixels], contents: list[bytes]) -> None:
    for content in contents:
        way(content)


def enlarged(contents: list[bytes], width: int, height: int) -> list[bytes]:
    made = []
    for content in contents:
        file = io.BytesIO()
        Image.fromarray(pillow(content)).resize((width, height), Image.Resampling.BICUBIC).save(
            file, "jpeg", quality=92
        )
        made.append(file.getvalue())
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    photos = real_photos()[: given.photos]
    with tempfile.TemporaryDirectory() as folder:
        text = store_table(Path(folder), photos, given.rounds) + "\n" + decoder_table(photos, given.rounds)
    if SKIPPED:
        text += f"\nNot installed, so not compared: {', '.join(SKIPPED)} (`pip install -e '.[bench]'`).\n"
    publish(text, given.out)


if __name__ == "__main__":
    main()
