"""A file that comes in pieces: what a full disk, or an address that fails half-way, does to what is there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svip.data import pieces, transfer
from svip.data.errors import DataError
from svip.data.sources import Description, FileSource

SIZE = 24 << 20


def test_a_write_that_takes_a_part_of_the_bytes_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "source").write_bytes(content)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:100_000], at))
    transfer.download([str(tmp_path / "source")], tmp_path / "out" / "a")
    assert (tmp_path / "out" / "a").read_bytes() == content


def test_a_full_disk_keeps_what_came_and_is_no_fault_of_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(3 << 20)
    (tmp_path / "source").write_bytes(content)
    write, room = os.pwrite, [1_000_000]

    def write_to_small_disk(file: int, data: bytes, at: int) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= (written := write(file, data[: room[0]], at))
        return written

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left on device; what came is kept"):
        patch.setattr(os, "pwrite", write_to_small_disk)
        transfer.download([str(tmp_path / "source")], tmp_path / "out" / "a")
    assert pieces.Partial(tmp_path / "out" / "a").received == 1_000_000
    transfer.download([str(tmp_path / "source")], tmp_path / "out" / "a")
    assert (tmp_path / "out" / "a").read_bytes() == content


class HalfThere:
    """Zeros; of the one called bad, the second half is refused."""

    def __init__(self, address: str) -> None:
        self.address = address

    def describe(self) -> Description:
        return Description(SIZE, "1", ranges=True)

    def read(self, start: int, stop: int | None, of: Description) -> Iterator[bytes]:
        if self.address == "bad" and start >= SIZE // 2:
            raise DataError("bad: answered 403")
        assert stop
        for at in range(start, stop, 1 << 16):
            yield bytes(min(1 << 16, stop - at))


def test_an_address_that_fails_half_way_is_left_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving, together = threading.Lock(), []

    def write_slowly(path: Path, note: dict[str, Any], write: Any = pieces.write_json) -> None:
        together.append(not saving.acquire(blocking=False))
        write(path, note)
        time.sleep(0.01)
        if not together[-1]:
            saving.release()

    monkeypatch.setattr(pieces, "write_json", write_slowly)
    monkeypatch.setattr(pieces, "PIECE", 1 << 20)
    monkeypatch.setattr(pieces, "SAVED_EVERY", 1 << 18)
    monkeypatch.setattr(pieces, "LOOKED_EVERY", 0)
    monkeypatch.setattr(transfer, "open_source", HalfThere)
    assert transfer.download(["bad", "good"], tmp_path / "a").source == "good"
    assert len(together) > 2
    assert not any(together), "two threads wrote the note at once"


def test_a_file_that_cant_be_read_is_the_fault_of_its_address(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"good")
    unreadable = str(tmp_path / ("long" * 100))  # root may read whatever has a name
    with pytest.raises(DataError, match=r"can't be read \(File name too long\)"):
        FileSource(unreadable).describe()
    assert transfer.download([unreadable, str(tmp_path / "source")], tmp_path / "a").source == str(tmp_path / "source")
