"""Packing photos into a bundle against their bare decoding, by as many threads or processes, with nothing written."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.common import arguments, best_of, markdown, publish, rate, real_photos
from svip.config import DataConfig
from svip.data.photos import decode
from svip.data.prepare import pack
from svip.data.splits import Split

STORE_SIZE = 256
GRAIN = 12
CORES = len(os.sched_getaffinity(0))


def enlarge(photo: Path, target: Path) -> None:
    """As a photo of CUB-200-2011 is: 500 pixels, about 97 kB. Those of the partial download are cut out and smooth."""
    with Image.open(photo) as image:
        smooth = np.asarray(image.resize((500, 400), Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(0).normal(0, GRAIN, smooth.shape)
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(target, quality=92)


def one(file: Path) -> int:
    return decode(file, STORE_SIZE).size


def bare(pool: Callable[..., Executor], files: list[Path]) -> float:
    with pool(CORES) as executor:
        sum(executor.map(one, files[:8]))  # started
        return rate(len(files), lambda: sum(executor.map(one, files, chunksize=8)))


def split_of(files: list[Path]) -> Split:
    images = pd.DataFrame({"path": [file.name for file in files], "class_id": 0, "role": "train"})
    classes = pd.DataFrame({"name": ["any"], "role": ["train"], "attribute": np.zeros(1, np.float32)})
    return Split(images, classes, missing=[], dropped_classes=[])


def cpu(files: list[Path], out: Path) -> tuple[float, float]:
    """CPU milliseconds a photo of the bare decoder in threads, and of packing."""
    used = []
    for work in (partial(bare, ThreadPoolExecutor, files), partial(packed, files, out)):
        start = time.process_time()
        work()
        used.append(1000 * (time.process_time() - start) / len(files))
    return used[0], used[1]


def packed(files: list[Path], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    return rate(len(files), partial(_pack, files, out))


def _pack(files: list[Path], out: Path) -> Any:
    return pack(split_of(files), files[0].parent, DataConfig(store_size=STORE_SIZE), {}, out)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--photos", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / "photos" / f"{number:05}.jpg" for number in range(given.photos)]
        files[0].parent.mkdir()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(enlarge, real_photos(), files))
        rates = best_of(
            given.rounds,
            {
                "bare decoder, threads": partial(bare, ThreadPoolExecutor, files),
                "bare decoder, processes": partial(bare, ProcessPoolExecutor, files),
                "packing": partial(packed, files, folder / "bundle"),
            },
        )
        bare_cpu, packing_cpu = np.median([cpu(files, folder / "bundle") for _ in range(given.rounds)], axis=0)
        size = (folder / "bundle" / "images.bin").stat().st_size / len(files)
        left, seconds = resume(files, folder)
    rows = [[name, f"{rate:,.0f}", f"{rates['packing'] / rate:.0%}"] for name, rate in rates.items()]
    publish(
        f"{len(files):,} photos of 500 x 400 pixels to {size / 1e3:.0f} kB each (shorter side {STORE_SIZE}), "
        f"{CORES} cores:\n\n"
        + markdown(("", "photos/s", "packing is"), rows)
        + f"\nCPU time a photo: {bare_cpu:.2f} ms bare, {packing_cpu:.2f} ms packed ({bare_cpu / packing_cpu:.0%}).\n"
        f"\nPacking that was killed when 70 % were done had {left} photos left, and took {seconds:.1f} s for them.\n",
        given.out,
    )


def resume(files: list[Path], folder: Path) -> tuple[int, float]:
    """Photos that are left to decode after a call that was killed when 70 % were done."""
    done = len(files) * 7 // 10
    out, journal = folder / "again", folder / ".again.part" / "journal.jsonl"
    process = os.fork()
    if process == 0:
        _pack(files, out)
        os._exit(0)
    while not journal.exists() or journal.read_text().count("\n") < done:
        time.sleep(0.01)
    os.kill(process, 9)
    os.waitpid(process, 0)
    before = journal.read_text().count("\n")
    start = time.perf_counter()
    _pack(files, out)
    return len(files) - before, time.perf_counter() - start


if __name__ == "__main__":
    main()
