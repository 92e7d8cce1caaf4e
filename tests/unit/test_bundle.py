from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from svip.data.bundle import TRAINVAL, Bundle, BundleError, BundleWriter, read_bundle

CLASSES = pd.DataFrame(
    {"name": ["wren", "crow", "gull"], "role": ["train", "val_unseen", "test_unseen"], "red": [0.5, 0, 1], "big": 0.25}
)
INFO = {"dataset": "cub", "split": "standard", "fold": 1, "settings": {"seed": 0}, "source": {}}


def picture(number: int, height: int = 2, width: int = 3) -> np.ndarray:
    return np.arange(number, number + height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def write(out: Path, masked: bool = False, first_pixel: int = 0, role: str = "train", **finish: Any) -> Bundle:
    with BundleWriter(out) as writer:
        first = picture(0)
        first[0, 0, 0] = first_pixel
        for number, (name, image_role, image) in enumerate(
            [("a.jpg", role, first), ("b.jpg", "val_unseen", picture(50, 4, 1)), ("c.jpg", "test_unseen", picture(90))]
        ):
            mask = np.full(image.shape[:2], number, np.uint8) if masked else None
            writer.add(name, number, image_role, image, mask)
        return writer.finish(finish.pop("classes", CLASSES), INFO, **finish)


def test_images_of_different_sizes_come_back_pixel_by_pixel(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    assert bundle.image(1).tolist() == picture(50, 4, 1).tolist()
    assert bundle.image(2).tolist() == picture(90).tolist()
    assert bundle.split["offset"].tolist() == [0, 18, 30]  # 2*3*3 and 4*1*3 bytes
    assert bundle.mask(0) is None
    assert not bundle.image(0).flags.writeable


def test_masks_share_the_order_of_images(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out", masked=True)
    for row, shape in enumerate([(2, 3), (4, 1), (2, 3)]):
        mask = bundle.mask(row)
        assert mask is not None
        assert mask.tolist() == np.full(shape, row).tolist()


def test_tables_keep_order_names_and_types(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out", extra_files={"word_vectors.txt": "red 1 2\n"}, missing=["x.jpg"] * 30)
    assert bundle.class_names == ["wren", "crow", "gull"]
    assert bundle.attribute_names == ["red", "big"]
    assert bundle.class_attributes.dtype == np.float32
    assert bundle.class_attributes.tolist() == [[0.5, 0.25], [0, 0.25], [1, 0.25]]
    assert bundle.rows("train").tolist() == [0]
    assert bundle.rows(*TRAINVAL).tolist() == [0, 1]
    assert bundle.classes_with("test_unseen", "train").tolist() == [0, 2]
    assert (bundle.path / "word_vectors.txt").read_text() == "red 1 2\n"
    assert bundle.info["counts"] == {
        "images": {"train": 1, "val_seen": 0, "val_unseen": 1, "test_seen": 0, "test_unseen": 1},
        "classes": {"train": 1, "val_unseen": 1, "test_unseen": 1},
        "missing": 30,
    }
    assert len(bundle.info["missing"]) == 20


def test_hash_depends_on_content_and_on_nothing_else(tmp_path: Path) -> None:
    base = write(tmp_path / "a").sha256
    assert write(tmp_path / "b", missing=["gone.jpg"]).sha256 == base
    changed = [
        write(tmp_path / "c", first_pixel=1),
        write(tmp_path / "d", role="val_seen"),
        write(tmp_path / "e", masked=True),
        write(tmp_path / "f", classes=CLASSES.assign(big=0.5)),
        write(tmp_path / "g", extra_files={"word_vectors.txt": "red 1\n"}),
    ]
    assert len({base, *(bundle.sha256 for bundle in changed)}) == 6


def test_pickled_bundle_carries_no_pixels(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    bundle.image(0)  # maps the store
    data = pickle.dumps(bundle)
    assert len(data) < 500
    assert pickle.loads(data).image(2).tolist() == bundle.image(2).tolist()


def test_failed_write_leaves_nothing_and_keeps_the_old_bundle(tmp_path: Path) -> None:
    old = write(tmp_path / "out").sha256
    with pytest.raises(BundleError, match="unknown role 'test'"):
        write(tmp_path / "out", role="test")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_bundle(tmp_path / "out").sha256 == old


def test_new_bundle_replaces_an_old_one_but_no_other_folder(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert write(tmp_path / "out", first_pixel=9).image(0)[0, 0, 0] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not a split bundle"):
        write(tmp_path / "thesis")
    with pytest.raises(BundleError, match="mount point"):
        BundleWriter("/")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (CLASSES.iloc[:2], r"class ids must lie in 0\.\.1"),
        (CLASSES.assign(role="seen"), "unknown role 'seen'"),
        (CLASSES.rename(columns={"big": "red"}), "distinct attribute names"),
        (CLASSES[["role", "name", "red"]], "class columns name, role"),
    ],
)
def test_inconsistent_classes_are_refused(tmp_path: Path, classes: pd.DataFrame, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write(tmp_path / "out", classes=classes)
    assert not (tmp_path / "out").exists()


def test_bad_images_are_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        with pytest.raises(BundleError, match=r"x\.jpg: expected uint8 pixels"):
            writer.add("x.jpg", 0, "train", np.zeros((2, 2, 3), np.float32))
        with pytest.raises(BundleError, match=r"expected a uint8 mask \[2, 3\]"):
            writer.add("x.jpg", 0, "train", picture(0), np.zeros((3, 2), np.uint8))
        with pytest.raises(BundleError, match="unknown role 'test'"):
            writer.add("x.jpg", 0, "test", picture(0))
        with pytest.raises(BundleError, match="at least one image"):
            writer.finish(CLASSES, INFO)
        writer.add("x.jpg", 0, "train", picture(0))
        writer.add("y.jpg", 0, "train", picture(0), np.zeros((2, 3), np.uint8))
        with pytest.raises(BundleError, match="1 of 2 images have a mask"):
            writer.finish(CLASSES, INFO)


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        read_bundle(tmp_path)
    path = write(tmp_path / "out").path
    (path / "images.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match="expected 48 bytes, found 5"):  # 18 + 12 + 18
        read_bundle(path)
    (path / "classes.parquet").unlink()
    with pytest.raises(BundleError, match="not a whole split bundle"):
        read_bundle(path)
    info = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(BundleError, match="expected format 2, found 99"):
        read_bundle(path)
    (path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": [0, 18, 29]}, "images back to back, none twice"),  # one pixel of the second is the third's too
        ({"offset": [0, 0, 30]}, "images back to back, none twice"),
        ({"offset": [0, 18, -30]}, "images back to back, none twice"),
        ({"offset": [0, 18, 1 << 62]}, "images back to back, none twice"),
        ({"offset": [0, 18, np.nan]}, "integers in"),
        ({"height": [2, 4, 3]}, r"images\.bin: expected 57 bytes .* found 48"),  # 18 + 12 + 3*3*3
        ({"height": [2, -4, 2]}, "sides of 1"),
        ({"width": [3, 1 << 40, 3]}, "sides of 1"),
        ({"width": [3.0, 1.0, 3.0]}, "integers in"),
        ({"width": ["3", "1", "3"]}, "integers in"),
        ({"class_id": [0, 1, 3]}, "class ids below 3"),
        ({"class_id": [0, 1, -1]}, "class ids below 3"),
        ({"role": ["train", "val_unseen", "tset"]}, "only the roles train"),
        ({"role": ["train", "val_unseen", None]}, "text in|only the roles"),
        ({"path": [1, 2, 3]}, "text in"),
        ({"sha256": None}, "the columns path, role, sha256"),
        ({"rows": 2}, r"images\.bin: expected 30 bytes .* found 48"),
        ({"rows": 0}, "at least one image"),
    ],
)
def test_a_damaged_split_table_reaches_no_pixel_that_is_not_its_own(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "out").path
    split = pd.read_parquet(path / "split.parquet")
    split = split.iloc[: changes.pop("rows", 3)]
    for column, values in changes.items():
        split = split.drop(columns=column) if values is None else split.assign(**{column: values})
    replace_table(path, "split.parquet", split)
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (CLASSES.iloc[:2], "class ids below 2"),
        (CLASSES.assign(red="much"), "numbers as attributes"),
        (CLASSES.assign(role="seen"), "only the roles train, val_unseen"),
        (CLASSES[["role", "name", "red"]], "name, role and one column an attribute"),
    ],
)
def test_a_damaged_class_table_is_refused(tmp_path: Path, classes: pd.DataFrame, message: str) -> None:
    path = write(tmp_path / "out").path
    replace_table(path, "classes.parquet", classes)
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


def record(**changes: Any) -> bytes:
    return json.dumps({"format": 2, "sha256": "0" * 64, "files": {}} | changes).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "found no mapping"),
        (b"{}", "expected format 2, found None"),
        (record(files=None), "expected the field files"),
        (record(files={"../images.bin": 3}), "expected the field files"),
        (record(files={"..": 3}), "expected the field files"),
        (record(files={"": 3}), "expected the field files"),
        (record(files={".hidden": 3}), "expected the field files"),
        (record(files={"a\\b": 3}), "expected the field files"),
        (record(files={"images.bin": "3"}), "expected the field files"),
        (record(sha256=None), "expected the field sha256"),
        (record(sha256="0" * 63), "expected the field sha256, of 64 hex digits"),
        (record(sha256="/../../x".ljust(64, "0")), "expected the field sha256, of 64 hex digits"),
        (record(files={"gone.bin": 3}), r"not a whole split bundle .*gone\.bin"),
        (record(files={"split.parquet": 3}), r"split\.parquet: expected 3 bytes"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "out").path
    (path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


def test_files_may_be_links_to_another_disk(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out", masked=True)
    (tmp_path / "linked").mkdir()
    for file in bundle.path.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert read_bundle(tmp_path / "linked").image(2).tolist() == picture(90).tolist()


def test_views_stay_valid_when_their_memory_is_given_back(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    views = [bundle.image(row) for row in range(3)]
    for row in (2, 0, 1):
        bundle.release(row)
    assert views[2].tolist() == picture(90).tolist()


def test_verifying_keeps_no_pages_in_memory(tmp_path: Path) -> None:
    count, side = 40, 640  # 49 MB
    with BundleWriter(tmp_path / "out") as writer:
        for number in range(count):
            writer.add(str(number), 0, "train", np.full((side, side, 3), number, np.uint8))
        bundle = writer.finish(CLASSES, INFO)
    before = pages_of_files()
    bundle.verify()
    assert pages_of_files() - before < 10_000_000


def pages_of_files() -> int:
    """Bytes of mapped files that are resident in this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssFile:")[2].split()[0])


def test_all_files_reach_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, replace = [], os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        replace(source, target)

    with BundleWriter(tmp_path / "out", {"a.jpg": 1}) as writer:
        writer.store("a.jpg", picture(0))
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    with BundleWriter(tmp_path / "out", {"a.jpg": 1}) as writer:
        assert list(writer.stored) == ["a.jpg"]  # so that images.bin is not opened for writing again
        writer.label("a.jpg", 0, "train")
        bundle = writer.finish(CLASSES, INFO, {"word_vectors.txt": "red 1\n"})
    rename = events.index(".out.part -> out")
    assert {file.name for file in bundle.path.iterdir()} | {".out.part"} <= set(events[:rename])
    assert events[rename + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("old", [True, False])
def test_a_second_writer_never_gets_at_the_folder_that_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """It tries at each step of publishing; once it may begin, it does so in a folder of its own."""
    out, refused, trying = tmp_path / "out", 0, False
    if old:
        write(out, first_pixel=9)

    def try_first(action: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal refused, trying
            if not trying:
                trying = True
                try:
                    with BundleWriter(out, {"a.jpg": 2}) as second:
                        assert not second.stored
                except BundleError:
                    refused += 1
                trying = False
            return action(*args, **options)

        return step

    with BundleWriter(out, {"a.jpg": 1}) as writer:
        writer.add("a.jpg", 0, "train", picture(0))
        monkeypatch.setattr(os, "replace", try_first(os.replace))
        monkeypatch.setattr(Path, "unlink", try_first(Path.unlink))
        bundle = writer.finish(CLASSES, INFO)
    assert refused == 1 + old
    assert bundle.image(0).tolist() == read_bundle(out).image(0).tolist() == picture(0).tolist()
    assert not (out / "journal.jsonl").exists()
    assert not (tmp_path / ".out.old").exists()


def test_who_has_published_leaves_the_next_writer_alone(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        writer.add("a.jpg", 0, "train", picture(0))
        writer.finish(CLASSES, INFO)
        second = ExitStack()
        other = second.enter_context(BundleWriter(tmp_path / "out"))
    with second:
        other.add("a.jpg", 0, "train", picture(7))
        assert other.finish(CLASSES, INFO).image(0).tolist() == picture(7).tolist()


def replace_table(path: Path, name: str, table: pd.DataFrame) -> None:
    """Such that bundle.json knows its size."""
    table.to_parquet(path / name, index=False)
    info = json.loads((path / "bundle.json").read_text())
    info["files"][name] = (path / name).stat().st_size
    (path / "bundle.json").write_text(json.dumps(info))


def test_unknown_role_is_refused_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="unknown role 'trainval'"):
        write(tmp_path / "out").rows("trainval")
