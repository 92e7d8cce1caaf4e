"""aPY made up in small: two photos of VOC2008 with three objects and two, and one of aYahoo for each class of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from svip.config import Config, DataConfig
from svip.data.apy import cut, read_objects
from svip.data.catalog import CATALOG, attribute_file, photo_folder
from svip.data.errors import DataError
from svip.data.prepare import prepare_data

SPEC = replace(
    CATALOG["apy"],
    classes=4,
    unseen_classes=1,
    val_classes=1,
    attributes=2,
    trainval=5,
    test_seen=3,
    test_unseen=2,
)
NAMES = ["bird", "cow", "mug", "zebra"]
OBJECTS = {  # file, class, and the box counted from 1, right and bottom included
    "apascal_train.txt": [("1.jpg", "bird", 1, 1, 4, 2), ("1.jpg", "cow", 5, 1, 8, 4), ("1.jpg", "bird", 1, 3, 2, 4)],
    "apascal_test.txt": [("2.jpg", "cow", 2, 2, 7, 3), ("2.jpg", "bird", 1, 1, 8, 4)],
    "ayahoo_test.txt": [
        ("mug_1.jpg", "mug", 1, 1, 8, 4),
        ("mug_2.jpg", "mug", 3, 3, 3, 2),  # no area
        ("zebra_1.jpg", "zebra", -3, 1, 4, 9),  # beyond the photo
        ("zebra_2.jpg", "zebra", 1, 1, 8, 4),
        ("mug_3.jpg", "mug", 1, 1, 8, 4),
    ],
}
BITS = " ".join("01" * 32)


def write_root(root: Path, classes: list[str] | None = None) -> Path:
    """The lists, photos of 8 x 4 with another colour at each pixel, and xlsa17's files."""
    lists = root / "apy" / "attribute_data"
    lists.mkdir(parents=True)
    files: list[str] = []
    found: list[str] = []
    for name, objects in OBJECTS.items():
        place = "ayahoo_test_images" if name.startswith("ayahoo") else "VOCdevkit/VOC2008/JPEGImages"
        (root / "apy" / place).mkdir(parents=True, exist_ok=True)
        (lists / name).write_text("".join(f"{' '.join(map(str, item))} {BITS}\n" for item in objects))
        for file, class_name, *_ in objects:
            Image.fromarray(pixels_of(file)).save(root / "apy" / place / file, "PNG")
            files.append(f"/BS/data/aPY/{place}/{file}")
            found.append(class_name)
    (lists / "attribute_names.txt").write_text("2D Boxy\nFoot/Shoe\n")
    folder = root / "xlsa17" / "data" / "APY"
    folder.mkdir(parents=True)
    labels = [NAMES.index(name) + 1 for name in classes or found]
    image_files = np.array([[file] for file in files], object)
    savemat(folder / "res101.mat", {"image_files": image_files, "labels": np.array(labels)[:, None]})
    names = np.array([[name] for name in NAMES], object)
    locs = {"trainval_loc": [1, 2, 3, 6, 10], "test_seen_loc": [4, 5, 7], "test_unseen_loc": [8, 9]}
    savemat(folder / "att_splits.mat", {"allclasses_names": names, "att": np.eye(2, 4) + 1, **locs})
    for fold, val in {1: "mug", 2: "cow", 3: "bird"}.items():
        (folder / f"trainclasses{fold}.txt").write_text("\n".join(n for n in NAMES[:3] if n != val))
        (folder / f"valclasses{fold}.txt").write_text(val)
    (folder / "testclasses.txt").write_text("zebra")
    return root


def pixels_of(file: str) -> np.ndarray:
    """A photo [4, 8, 3] whose pixels say where they are."""
    rows, columns = np.mgrid[:4, :8]
    return np.stack([rows, columns, np.full((4, 8), sum(file.encode()) % 256)], 2).astype(np.uint8)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(CATALOG, "apy", SPEC)
    data = DataConfig("apy", root=str(write_root(tmp_path / "data")), store_size=0, val_seen_fraction=0.3)
    return Config(data=data)


def test_each_object_is_an_image_cut_out_of_its_photo(config: Config, tmp_path: Path) -> None:
    bundle = prepare_data(config, tmp_path / "bundle")
    voc = "VOCdevkit/VOC2008/JPEGImages"
    assert bundle.split["path"].tolist() == [
        *(f"{voc}/{name}" for name in ("1.jpg#1", "1.jpg#2", "1.jpg#3", "2.jpg#1", "2.jpg#2")),
        *(f"ayahoo_test_images/{name}.jpg#1" for name in ("mug_1", "mug_2", "zebra_1", "zebra_2", "mug_3")),
    ]
    found = [bundle.class_names[class_id] for class_id in bundle.split["class_id"]]
    assert found == ["bird", "cow", "bird", "cow", "bird", "mug", "mug", "zebra", "zebra", "mug"]
    roles = ["test_seen", "test_seen", "val_unseen", "test_seen", "test_unseen", "test_unseen", "val_unseen"]
    assert bundle.split["role"].tolist()[3:] == roles
    np.testing.assert_array_equal(bundle.image(0), pixels_of("1.jpg")[0:2, 0:4])
    np.testing.assert_array_equal(bundle.image(1), pixels_of("1.jpg")[0:4, 4:8])
    np.testing.assert_array_equal(bundle.image(3), pixels_of("2.jpg")[1:3, 1:7])
    np.testing.assert_array_equal(bundle.image(6), pixels_of("mug_2.jpg"))  # the whole photo
    np.testing.assert_array_equal(bundle.image(7), pixels_of("zebra_1.jpg")[:, :4])
    assert bundle.attribute_names == ["2D Boxy", "Foot/Shoe"]
    assert bundle.info["source"]["proposed_split"] == 2
    larger = prepare_data(replace(config, data=replace(config.data, store_size=240)), tmp_path / "larger")
    assert larger.split[["height", "width"]].min(axis=1).tolist() == [240] * 10


def test_a_missing_photo_misses_all_its_objects(config: Config, tmp_path: Path) -> None:
    root = Path(str(config.data.root))
    (photo_folder(SPEC, root) / "VOCdevkit/VOC2008/JPEGImages/1.jpg").unlink()
    with pytest.raises(
        DataError, match=r"3 of 10 listed photos are missing.*`svip fetch apy .*--again`(.|\n)*1\.jpg#3"
    ):
        prepare_data(config, tmp_path / "bundle")


def test_an_order_that_is_not_that_of_the_lists_is_refused(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = ["cow", "bird", "bird", "cow", "bird", "mug", "mug", "zebra", "zebra", "mug"]
    config.data.root = str(write_root(tmp_path / "swapped", swapped))
    with pytest.raises(DataError, match=r"1\.jpg#1 is labelled cow, but it is of bird"):
        prepare_data(config, tmp_path / "bundle")
    lists = attribute_file(SPEC, Path(config.data.root)).parent
    files = [file for objects in OBJECTS.values() for file, *_ in objects]
    assert read_objects(lists, files)[1][:2] == ["bird", "cow"]
    for wrong, message in (
        ([files[3], *files[1:]], r"apascal_train\.txt, line 1: 1\.jpg, but res101\.mat lists 2\.jpg there"),
        (files[:-1], r"ayahoo_test\.txt, line 5: mug_3\.jpg, but res101\.mat lists nothing more there"),
        ([*files, "x.jpg"], r"10 objects, but res101\.mat lists 11"),
    ):
        with pytest.raises(DataError, match=message):
            read_objects(lists, wrong)


@pytest.mark.parametrize("line", ["1.jpg bird 1 1 4", f"1.jpg bird 1 1 4 x {BITS}", f"1.jpg bird 1 1 4 2 {BITS} 1"])
def test_lines_of_another_form_are_refused(tmp_path: Path, line: str) -> None:
    lists = write_root(tmp_path) / "apy" / "attribute_data"
    (lists / "apascal_train.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"apascal_train\.txt, line 1: expected a file, a class and 68 whole numbers"):
        read_objects(lists, ["1.jpg"])
    (lists / "apascal_train.txt").unlink()
    with pytest.raises(DataError, match=r"apascal_train\.txt does not exist; .*attribute_data\.tar\.gz"):
        read_objects(lists, ["1.jpg"])


def test_a_narrow_box_is_widened_inside_the_photo() -> None:
    photo = np.arange(64 * 64, dtype=np.uint16).astype(np.uint8).reshape(64, 64, 1).repeat(3, 2)
    np.testing.assert_array_equal(cut(photo, (30, 0, 32, 64)), photo[:, 27:35])  # an eighth of 64 about the middle
    np.testing.assert_array_equal(cut(photo, (0, 62, 64, 64)), photo[56:64])
    np.testing.assert_array_equal(cut(photo, (0, 0, 9, 64)), photo[:, :9])  # wide enough
