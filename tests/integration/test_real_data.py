"""The real archives: xlsa17's metadata of four data sets, and the photos of CUB that are there."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from benchmarks.metadata import EXPECTED, made_up_apy, told_by_content
from svip.config import Config, DataConfig
from svip.data.catalog import CATALOG, attribute_file, photo_folder, xlsa17_folder
from svip.data.errors import DataError
from svip.data.inventory import inventory
from svip.data.prepare import pack, prepare_data
from svip.data.splits import Listing, Split, make_split, read_listing

ROOT = Path(__file__).parents[2] / os.environ.get("SVIP_SHARED", "../shared") / "data"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not ROOT.is_dir(), reason=f"no shared data at {ROOT}; set SVIP_SHARED"),
]


def listing_of(name: str) -> Listing:
    spec = CATALOG[name]
    return read_listing(spec, xlsa17_folder(spec, ROOT), attribute_file(spec, ROOT))


def roles(split: Split) -> dict[str, int]:
    return {str(role): int(count) for role, count in split.images["role"].value_counts().items()}


def classes_of(split: Split) -> dict[str, int]:
    return {str(role): int(count) for role, count in split.classes["role"].value_counts().items()}


@pytest.fixture(scope="module")
def cub() -> Listing:
    return listing_of("cub")


@pytest.fixture(scope="module")
def cub_94(cub: Listing) -> Split:
    photos = photo_folder(CATALOG["cub"], ROOT)
    present = np.array([(photos / path).is_file() for path in cub.images["path"]])
    return make_split(cub, DataConfig(dataset="cub", split="development", allow_missing=True), present)


@pytest.mark.parametrize(
    ("name", "trainval", "test_seen", "test_unseen", "class_counts"),
    [  # Xian et al., Tables 1 and 2
        ("cub", 7057, 1764, 2967, {"train": 100, "val_unseen": 50, "test_unseen": 50}),
        ("awa2", 23527, 5882, 7913, {"train": 27, "val_unseen": 13, "test_unseen": 10}),
        ("sun", 10320, 2580, 1440, {"train": 580, "val_unseen": 65, "test_unseen": 72}),
    ],
)
def test_proposed_split_has_the_published_counts(
    name: str, trainval: int, test_seen: int, test_unseen: int, class_counts: dict[str, int]
) -> None:
    listing = listing_of(name)
    # version 1 leaks every one of them
    assert listing.origin == {"proposed_split": 1, "test_seen_in_train_or_val_loc": test_seen}
    for fold in (1, 2, 3):
        split = make_split(listing, DataConfig(dataset=name, fold=fold), np.ones(len(listing.images), bool))
        count = roles(split)
        assert count["train"] + count["val_seen"] + count["val_unseen"] == trainval
        assert count["val_seen"] / (count["train"] + count["val_seen"]) == pytest.approx(0.15, abs=0.03)
        assert (count["test_seen"], count["test_unseen"]) == (test_seen, test_unseen)
        assert classes_of(split) == class_counts


def test_cub_agrees_with_the_archive_itself(cub: Listing) -> None:
    archive = photo_folder(CATALOG["cub"], ROOT)

    def column(file: str) -> list[str]:
        return [line.split()[1] for line in (archive / file).read_text().splitlines()]

    names = column("classes.txt")
    labels = [names[int(label) - 1] for label in column("image_class_labels.txt")]
    own = {f"images/{file}": label for file, label in zip(column("images.txt"), labels, strict=True)}
    found = [cub.class_names[class_id] for class_id in cub.images["class_id"]]
    assert dict(zip(cub.images["path"], found, strict=True)) == own
    continuous = np.loadtxt(archive / "attributes" / "class_attribute_labels_continuous.txt")
    assert_same_up_to_scale(cub, continuous[[names.index(name) for name in cub.class_names]])
    assert cub.attribute_names[::311] == ["has_bill_shape::curved_(up_or_down)", "has_wing_pattern::multi-colored"]


def test_awa2_agrees_with_the_archive_itself() -> None:
    listing, archive = listing_of("awa2"), photo_folder(CATALOG["awa2"], ROOT)
    names = [line.split()[1] for line in (archive / "classes.txt").read_text().splitlines()]
    continuous = np.loadtxt(archive / "predicate-matrix-continuous.txt")
    assert_same_up_to_scale(listing, continuous[[names.index(name) for name in listing.class_names]])
    assert listing.attribute_names[:2] == ["black", "white"]


def assert_same_up_to_scale(listing: Listing, own: np.ndarray) -> None:
    """xlsa17's rows are the archive's, divided by their length."""
    np.testing.assert_allclose(listing.attributes, own / np.linalg.norm(own, axis=1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize("name", ["cub", "sun", "awa2"])
def test_attribute_names_stand_over_their_own_columns(name: str) -> None:
    listing, (expected, top) = listing_of(name), EXPECTED[name]
    assert len(expected) >= 10
    assert told_by_content(listing, expected, top) == len(expected)
    for shift in (1, -1):  # as many names, another order: the same check fails
        assert told_by_content(listing, expected, top, shift) < len(expected) / 2


def test_full_metadata_of_apy_parses_with_lists_that_fit_it(tmp_path: Path) -> None:
    listing = made_up_apy(xlsa17_folder(CATALOG["apy"], ROOT), tmp_path)
    assert listing.images["part"].value_counts().to_dict() == {"test_unseen": 7924, "trainval": 5932, "test_seen": 1483}
    split = make_split(listing, DataConfig(dataset="apy"), np.ones(15339, bool))
    assert classes_of(split) == {"train": 15, "val_unseen": 5, "test_unseen": 12}
    expected, top = EXPECTED["apy"]
    assert told_by_content(listing, expected, top) == len(expected)


def test_apy_lists_the_objects_of_ayahoo_last_and_class_by_class() -> None:
    unseen = np.sort(loadmat(xlsa17_folder(CATALOG["apy"], ROOT) / "att_splits.mat")["test_unseen_loc"].ravel())
    of_ayahoo = unseen[unseen > 6340 + 6355]
    runs = np.split(of_ayahoo, np.flatnonzero(np.diff(of_ayahoo) > 1) + 1)
    assert [len(run) for run in runs] == [139, 163, 399, 207]  # donkey, goat, jetski, statue


@pytest.mark.parametrize("name", ["cub", "awa2", "sun"])
def test_version_2_gives_the_same_parts_as_version_1(tmp_path: Path, name: str) -> None:
    spec, folder = CATALOG[name], xlsa17_folder(CATALOG[name], ROOT)
    second = tmp_path / spec.xlsa17
    shutil.copytree(folder, second, copy_function=shutil.copyfile)
    tables = {key: value for key, value in loadmat(folder / "att_splits.mat").items() if not key.startswith("__")}
    for key in ("train_loc", "val_loc"):
        tables[key] = np.intersect1d(tables[key], tables["trainval_loc"])[:, None]
    assert len(tables["train_loc"]) + len(tables["val_loc"]) == spec.trainval
    savemat(second / "att_splits.mat", tables)
    listing = read_listing(spec, second, attribute_file(spec, ROOT))
    assert listing.origin == {"proposed_split": 2, "test_seen_in_train_or_val_loc": 0}
    assert listing.images.equals(listing_of(name).images)


def test_what_is_there_is_listed_quickly() -> None:
    start = perf_counter()
    here = {entry["name"]: entry["here"] for entry in inventory(ROOT)}
    assert perf_counter() - start < 2
    assert here["cub"]["photos"] == 4402
    assert {name: here[name]["proposed_split"] for name in CATALOG} == {"cub": 1, "awa2": 1, "sun": 1, "apy": 2}


def test_cub_94_is_a_whole_zero_shot_problem(cub_94: Split) -> None:
    assert classes_of(cub_94) == {"train": 44, "val_unseen": 20, "test_unseen": 30}
    count = roles(cub_94)
    assert count["test_unseen"] == 1397
    assert sum(count.values()) - count["test_unseen"] == 3005
    assert len(cub_94.missing) == 7057 - 4402
    assert len(cub_94.dropped_classes) == 150 - 94
    assert count["test_seen"] / 3005 == pytest.approx(0.15, abs=0.01)


def test_missing_photos_of_cub_are_counted(tmp_path: Path) -> None:
    config = Config(data=DataConfig(dataset="cub", root=str(ROOT)))
    with pytest.raises(DataError, match="7386 of 11788 listed photos are missing"):
        prepare_data(config, tmp_path / "out")
    config.data.split = "development"
    with pytest.raises(DataError, match="2655 of 7057 listed photos are missing"):
        prepare_data(config, tmp_path / "out")
    config.data.split, config.data.allow_missing = "standard", True
    with pytest.raises(DataError, match=r"set data\.split=development"):
        prepare_data(config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_photos_of_cub_are_packed_pixel_by_pixel(cub_94: Split, tmp_path: Path) -> None:
    photos = photo_folder(CATALOG["cub"], ROOT)
    few = replace(cub_94, images=cub_94.images.iloc[::110])
    bundle = pack(few, photos, DataConfig(store_size=227), {}, tmp_path / "out")
    assert len(bundle.split) == 41  # of 4402
    for row, path in enumerate(bundle.split["path"]):
        with Image.open(photos / path) as photo:
            np.testing.assert_array_equal(bundle.image(row), photo.convert("RGB"))
    smaller = pack(few, photos, DataConfig(store_size=64), {}, tmp_path / "small")
    assert set(zip(smaller.split["height"], smaller.split["width"], strict=True)) == {(64, 64)}
    assert all(abs(smaller.image(row).mean() - bundle.image(row).mean()) < 0.5 for row in range(41))
