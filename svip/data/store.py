"""The pixels of a bundle while it is being written, so that an interrupted packing goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

JOURNAL = "journal.jsonl"


class Busy(Exception):
    """Another process writes to the folder."""


@dataclass(frozen=True)
class Stored:
    """An image in the store: its size in pixels, the sha256 of its pixels, and what it was made of."""

    height: int
    width: int
    sha256: str
    origin: Any = None


class Store:
    """``images.bin`` and ``masks.bin`` in a folder of their own, which one process at a time may write to.

    A journal names each image as soon as its pixels are there. ``origins`` says per path what the image's pixels come
    from (anything that JSON can hold): the images that the folder holds already are kept, in order, up to the first
    that is damaged or that comes from something else. None: begin anew.
    """

    def __init__(self, folder: Path, origins: Mapping[str, Any] | None = None) -> None:
        """Raises Busy."""
        self.folder = folder
        self._origins = origins
        self.images: dict[str, Stored] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._opened = ExitStack()
        try:
            self._journal = self._opened.enter_context(open(folder / JOURNAL, "a+", encoding="utf-8", buffering=1))  # noqa: SIM115
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._journal.fileno()), os.stat(folder / JOURNAL)):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):  # the latter: it was renamed or removed just now
            self._opened.close()
            raise Busy from None
        self._files: dict[str, FileIO] = {}
        self._take_up()

    def append(self, path: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None, sha256: str = "") -> None:
        """Write an image, uint8 [H, W, 3], and its mask, uint8 [H, W]. ``sha256``: its pixel_sha256 where known."""
        self._write("images.bin", image)
        if mask is not None:
            self._write("masks.bin", mask)
        height, width = image.shape[:2]
        origin = self._origins[path] if self._origins else None
        stored = self.images[path] = Stored(height, width, sha256 or pixel_sha256(image, mask), origin)
        self._journal.write(json.dumps([path, *astuple(stored)]) + "\n")

    def sync(self) -> None:
        """Have the disk hold all files of the folder, whoever wrote them."""
        for file in self.folder.iterdir():
            sync(file)
        sync(self.folder)

    def close(self, keep: bool) -> None:
        """Let the next process in. Without ``keep`` the folder is removed; ``keep`` it, too, once it was renamed."""
        if not keep:
            self._clear(JOURNAL)  # the lock, which goes last
            shutil.rmtree(self.folder, ignore_errors=True)
        self._opened.close()

    def _write(self, name: str, array: NDArray[np.uint8]) -> None:
        if name not in self._files:
            self._files[name] = self._opened.enter_context(open(self.folder / name, "ab", buffering=0))  # noqa: SIM115
        content = np.ascontiguousarray(array).reshape(-1).data
        while content:  # of a disk that is getting full, only a part is accepted
            content = content[self._files[name].write(content) :]

    def _clear(self, *kept: str) -> None:
        for file in self.folder.iterdir():
            if file.name not in kept:
                file.unlink()

    def _take_up(self) -> None:
        """Nothing is cut off before all was read: a process that is killed here loses nothing."""
        self._clear(JOURNAL, "images.bin")
        self._journal.seek(0)
        with open(self.folder / "images.bin", "a+b") as pixels:
            pixels.seek(0)
            journal_end = pixels_end = 0
            for line in self._journal.readlines():
                path, stored = _parse(line)
                if not self._origins or self._origins.get(path) != stored.origin:
                    break
                content = pixels.read(stored.height * stored.width * 3)
                if hashlib.sha256(content).hexdigest() != stored.sha256:
                    break
                self.images[path] = stored
                journal_end += len(line.encode())
                pixels_end += len(content)
            self._journal.truncate(journal_end)
            pixels.truncate(pixels_end)


def pixel_sha256(image: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None) -> str:
    """Of an image's bytes, and its mask's behind them."""
    digest = hashlib.sha256(np.ascontiguousarray(image).data)
    if mask is not None:
        digest.update(np.ascontiguousarray(mask).data)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(line: str) -> tuple[str, Stored]:
    """A line of the journal; a torn one names no image."""
    try:
        path, *fields = json.loads(line if line.endswith("\n") else "")
        return path, Stored(*fields)
    except (ValueError, TypeError):
        return "", Stored(0, 0, "")
