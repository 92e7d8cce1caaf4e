"""Packing that is interrupted, meets bad photos or a full disk, or is done by two at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from svip.config import DataConfig
from svip.data import prepare
from svip.data.bundle import Bundle, BundleError, BundleWriter, DataError, read_bundle
from svip.data.splits import Split

COUNT = 30
SIZE = 8
PIXELS = SIZE * 12 * 3
"""Bytes of one stored image: 20 x 30 pixels with the shorter side at SIZE."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(COUNT):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(folder / f"{number:02}.png")
    return folder


def split(order: list[int] | None = None) -> Split:
    names = [f"{number:02}.png" for number in order or range(COUNT)]
    images = pd.DataFrame({"path": names, "class_id": 0, "role": "train"})
    return Split(images, pd.DataFrame({"name": ["a"], "role": ["train"], "red": np.ones(1, np.float32)}), [], [])


def pack(photos: Path, out: Path, store_size: int = SIZE) -> Bundle:
    return prepare.pack(split(), photos, DataConfig(store_size=store_size), {}, out)


def spoil(photos: Path, *numbers: int) -> dict[Path, bytes]:
    """Make these photos unreadable; the content that they had."""
    files = {photos / f"{number:02}.png": (photos / f"{number:02}.png").read_bytes() for number in numbers}
    for file in files:
        file.write_bytes(b"<html>404")
    return files


def decoded_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the photos that are decoded from now on."""
    names: list[str] = []
    original = prepare._try_decode

    def note(file: Path, *rest: Any) -> Any:
        names.append(file.name)
        return original(file, *rest)

    monkeypatch.setattr(prepare, "_try_decode", note)
    return names


def test_good_photos_stay_packed_until_the_bad_ones_are_fetched_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(photos, tmp_path / "whole")
    bad = spoil(photos, 3, 20)
    with pytest.raises(DataError, match=r"2 photos (.|\n)*other 28 stay packed(.|\n)*03\.png(.|\n)*20\.png"):
        pack(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for file, content in bad.items():
        file.write_bytes(content)
    names = decoded_by(monkeypatch)
    bundle = pack(photos, tmp_path / "out")
    assert sorted(names) == ["03.png", "20.png"]
    assert bundle.split["offset"].tolist()[3] == 28 * PIXELS  # stored late, listed in its place
    assert [int(bundle.image(row)[0, 0, 0]) for row in range(COUNT)] == list(range(COUNT))
    assert bundle.sha256 == whole.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "whole"]


def test_only_what_is_intact_and_of_the_same_origin_is_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = spoil(photos, COUNT - 1)
    work = tmp_path / ".out.part"

    def interrupted(store_size: int = SIZE) -> list[str]:
        names = decoded_by(monkeypatch)
        with pytest.raises(DataError, match="1 photos"):
            pack(photos, tmp_path / "out", store_size)
        monkeypatch.undo()
        return sorted(names)

    assert len(interrupted()) == COUNT
    assert interrupted() == ["29.png"]
    with open(work / "images.bin", "ab") as file:  # pixels that no line of the journal names
        file.write(b"torn")
    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    (work / "journal.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # a line that was cut off
    assert interrupted() == ["28.png", "29.png"]
    content = bytearray((work / "images.bin").read_bytes())
    assert len(content) == 29 * PIXELS
    content[10 * PIXELS] ^= 1
    (work / "images.bin").write_bytes(content)
    assert interrupted() == [f"{number}.png" for number in range(10, COUNT)]
    os.truncate(work / "images.bin", 5 * PIXELS + 1)
    assert len(interrupted()) == COUNT - 5
    assert len(interrupted(store_size=10)) == COUNT
    Image.new("RGB", (50, 20), (0, 9, 0)).save(photos / "00.png")
    assert len(interrupted(store_size=10)) == COUNT
    for photo, original in bad.items():
        photo.write_bytes(original)
    assert pack(photos, tmp_path / "out", 10).image(0).shape == (10, 25, 3)
    assert not work.exists()


def test_unreadable_photos_are_fetched_by_the_command_that_there_is(photos: Path, tmp_path: Path) -> None:
    spoil(photos, 3)
    for data, told in ((DataConfig("custom"), False), (DataConfig("cub", root="data"), True)):
        with pytest.raises(DataError, match="1 photos below .* can't be decoded; fetch them again") as refused:
            prepare.pack(split(), photos, data, {}, tmp_path / "out")
        assert ("`svip fetch cub --root data --again`" in str(refused.value)) is told
        assert ("svip fetch" in str(refused.value)) is told


def test_a_killed_packing_goes_on_where_it_was(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from svip.data import prepare; import test_packing as tests; original = prepare._try_decode\n"
        "def slow(file, *rest):\n"
        "    time.sleep(60 * (file.name >= '16.png'))\n"
        "    return original(file, *rest)\n"
        "prepare._try_decode = slow; tests.pack(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    out, journal = tmp_path / "out", tmp_path / ".out.part" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(photos), str(out), str(Path(__file__).parent)])
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("\n") < 16:  # two batches
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(BundleError, match="out is being written by another process"):
        pack(photos, out)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert not out.exists()
    names = decoded_by(monkeypatch)
    assert len(pack(photos, out).split) == COUNT
    assert sorted(names) == [f"{number}.png" for number in range(16, COUNT)]


def test_a_kill_while_packed_photos_are_checked_loses_none(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = spoil(photos, COUNT - 1)
    with pytest.raises(DataError, match="1 photos"):
        pack(photos, tmp_path / "out")
    process = os.fork()
    if process == 0:  # killed at the sixth photo
        checked, sha256 = iter(range(5)), hashlib.sha256
        monkeypatch.setattr(
            hashlib, "sha256", lambda data: os._exit(9) if next(checked, None) is None else sha256(data)
        )
        pack(photos, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    for photo, content in bad.items():
        photo.write_bytes(content)
    names = decoded_by(monkeypatch)
    pack(photos, tmp_path / "out").verify()
    assert names == ["29.png"]


def test_the_hash_does_not_depend_on_the_order_of_the_store(photos: Path, tmp_path: Path) -> None:
    bundles = []
    for name, order in (("up", range(3)), ("down", range(2, -1, -1))):
        with BundleWriter(tmp_path / name) as writer:
            for number in order:
                writer.store(f"{number}", np.full((2, 2, 3), number, np.uint8))
            for number in range(3):
                writer.label(f"{number}", 0, "train")
            bundles.append(writer.finish(split().classes, {}))
    up, down = bundles
    assert down.split["offset"].tolist() == [24, 12, 0]
    assert up.sha256 == down.sha256
    assert down.image(2).tolist() == up.image(2).tolist()


def test_a_full_disk_is_noticed_before_anything_is_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = COUNT * PIXELS - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    names = decoded_by(monkeypatch)
    with pytest.raises(DataError, match="30 photos take about .* GB, but only .* make room"):
        pack(photos, tmp_path / "out")
    assert not names
    free += 1
    pack(photos, tmp_path / "out")


def test_images_without_label_or_twice_are_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        writer.store("a.jpg", np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(BundleError, match=r"a\.jpg: there is an image of this path already"):
            writer.add("a.jpg", 0, "train", np.zeros((2, 2, 3), np.uint8))
        writer.store("b.jpg", np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(BundleError, match="2 images are stored, but 0 have a label"):
            writer.finish(split().classes, {})


def test_damage_is_found_by_verifying(photos: Path, tmp_path: Path) -> None:
    bundle = pack(photos, tmp_path / "out")
    bundle.verify()
    with open(bundle.path / "images.bin", "r+b") as file:
        file.seek(7 * PIXELS)
        file.write(b"\xff")
    with pytest.raises(BundleError, match=r"the pixels of 1 images are damaged \(07\.png\)"):
        read_bundle(bundle.path).verify()
    pack(photos, bundle.path).verify()
    labels = bundle.split.assign(role="val_unseen")
    labels.to_parquet(bundle.path / "split.parquet", index=False)
    info = json.loads((bundle.path / "bundle.json").read_text())
    info["files"]["split.parquet"] = (bundle.path / "split.parquet").stat().st_size
    (bundle.path / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(BundleError, match=r"don't fit the sha256"):
        read_bundle(bundle.path).verify()
