"""The Proposed Split on a hand-made xlsa17: 4 seen classes a-d of 10 + 2 images, 1 unseen class e of 6."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from svip.config import Config, DataConfig
from svip.data import prepare
from svip.data.catalog import CATALOG, DatasetSpec, attribute_file, photo_folder, xlsa17_folder
from svip.data.errors import DataError
from svip.data.photos import decode
from svip.data.splits import (
    Listing,
    Split,
    check_split,
    make_split,
    proposed_split_version,
    read_attribute_names,
    read_listing,
    relative_path,
)

SPEC = DatasetSpec(
    name="cub",
    folder="CUB_200_2011",
    xlsa17="CUB",
    attribute_files=("../attributes.txt",),
    classes=5,
    unseen_classes=1,
    val_classes=1,
    attributes=3,
    trainval=40,
    test_seen=8,
    test_unseen=6,
)
ORDER = ["d", "b", "e", "a", "c"]
"""xlsa17's own order of the classes; the images are listed by name."""
ATTRIBUTES = {name: [number, 10.0 * number, 0.5] for number, name in enumerate("abcde", start=1)}
FILES = [f"images/{name}/{name}{n:02}.png" for name in "abcde" for n in range(6 if name == "e" else 12)]


def write_root(root: Path, **change: Any) -> Path:
    """xlsa17's files and attributes.txt; ``change`` replaces variables, or a class file's lines (trainclasses1=...)."""
    folder = root / "xlsa17" / "data" / "CUB"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(1, len(FILES) + 1)  # 1-based, as MATLAB counts
    name = np.array([file.split("/")[1] for file in FILES])
    test_seen = np.array([file[-6:-4] in ("03", "08") for file in FILES]) & (name != "e")
    tables: dict[str, Any] = {
        "allclasses_names": np.array([[name] for name in ORDER], object),
        "att": np.array([ATTRIBUTES[name] for name in ORDER]).T,
        "trainval_loc": numbers[(name != "e") & ~test_seen][:, None].astype(np.uint16),
        "test_seen_loc": numbers[test_seen][:, None],
        "test_unseen_loc": numbers[name == "e"][:, None],
        "train_loc": numbers[(name != "e") & (name != "d")][:, None],  # version 1's leak: with test_seen
        "val_loc": numbers[name == "d"][:, None],
        "image_files": np.array([[f"/BS/work/CUB_200_2011/CUB_200_2011//{file}"] for file in FILES], object),
        "labels": np.array([[ORDER.index(letter) + 1] for letter in name]),
    }
    classes = {"testclasses": ["e"]}
    for fold, val in {1: "d", 2: "c", 3: "b"}.items():
        classes[f"trainclasses{fold}"] = [letter for letter in "abcd" if letter != val]
        classes[f"valclasses{fold}"] = [val]
    classes.update({key: change.pop(key) for key in list(change) if key in classes})
    tables.update(change)
    listed = {key: tables.pop(key) for key in ("image_files", "labels")}
    savemat(folder / "att_splits.mat", tables)
    savemat(folder / "res101.mat", {**listed, "features": np.zeros((2, 3))})
    for key, lines in classes.items():
        (folder / f"{key}.txt").write_text("\n".join(lines) + "\n")
    (root / "cub").mkdir(exist_ok=True)
    (root / "cub" / "attributes.txt").write_text("1 size\n2 bill::long (or so)\n3 red\n")
    return root


def listing_of(root: Path, spec: DatasetSpec = SPEC) -> Listing:
    return read_listing(spec, xlsa17_folder(spec, root), attribute_file(spec, root))


def split_of(listing: Listing, present: np.ndarray | None = None, **settings: Any) -> Split:
    data = DataConfig(dataset="cub", val_seen_fraction=settings.pop("val_seen_fraction", 0.2), **settings)
    return make_split(listing, data, np.ones(len(FILES), bool) if present is None else present)


def paths(split: Split, *roles: str) -> list[str]:
    return sorted(split.images["path"][split.images["role"].isin(roles)])


def count(split: Split) -> dict[str, dict[str, int]]:
    """role -> class name -> images."""
    names = split.classes["name"].to_numpy()[split.images["class_id"]]
    return {
        role: dict(sorted(group.value_counts().items()))
        for role, group in split.images.assign(name=names).groupby("role")["name"]
    }


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return listing_of(write_root(tmp_path))


def test_standard_split_parts_all_images_by_role(listing: Listing) -> None:
    split = split_of(listing)
    assert count(split) == {
        "train": {"a": 8, "b": 8, "c": 8},
        "val_seen": {"a": 2, "b": 2, "c": 2},  # 20 % of 10
        "val_unseen": {"d": 10},
        "test_seen": {"a": 2, "b": 2, "c": 2, "d": 2},
        "test_unseen": {"e": 6},
    }
    roles = dict(zip(split.classes["name"], split.classes["role"], strict=True))
    assert roles == {"a": "train", "b": "train", "c": "train", "d": "val_unseen", "e": "test_unseen"}
    assert paths(split, "test_unseen") == [f"images/e/e{n:02}.png" for n in range(6)]


def test_other_folds_have_other_validation_classes(listing: Listing) -> None:
    assert list(count(split_of(listing, fold=2))["val_unseen"]) == ["c"]
    assert list(count(split_of(listing, fold=3))["val_unseen"]) == ["b"]


def test_development_split_is_a_problem_inside_trainval(listing: Listing) -> None:
    split = split_of(listing, split="development")
    assert count(split) == {
        "train": {"a": 6, "b": 6},
        "val_seen": {"a": 2, "b": 2},  # 20 % of the 8 left
        "val_unseen": {"c": 8},  # c is a validation class of fold 2
        "test_seen": {"a": 2, "b": 2, "c": 2},  # 20 % of 10
        "test_unseen": {"d": 10},
    }
    assert sorted(split.images["path"]) == [file for file in FILES if "/e/" not in file and file[-6:-4] not in "03 08"]
    last = split_of(listing, split="development", fold=3)  # fold 1 follows fold 3
    assert {role: list(names) for role, names in count(last).items() if role.endswith("unseen")} == {
        "val_unseen": ["d"],
        "test_unseen": ["b"],
    }


@pytest.mark.parametrize("which", ["standard", "development"])
def test_class_ids_rows_and_attributes_agree(listing: Listing, which: str) -> None:
    split = split_of(listing, split=which)
    assert split.classes["name"].tolist() == (ORDER if which == "standard" else ["d", "b", "a", "c"])
    assert split.classes.columns.tolist() == ["name", "role", "size", "bill::long (or so)", "red"]
    for row in split.classes.itertuples(index=False):
        assert list(row)[2:] == ATTRIBUTES[row.name]
    for path, class_id in zip(split.images["path"], split.images["class_id"], strict=True):
        assert path.split("/")[1] == split.classes["name"][class_id]


def test_leak_of_test_images_into_train_loc_is_closed(listing: Listing) -> None:
    assert listing.origin == {"proposed_split": 1, "test_seen_in_train_or_val_loc": 8}
    for which in ("standard", "development"):
        assert not [path for path in paths(split_of(listing, split=which), "train", "val_seen", "val_unseen")
                    if path[-6:-4] in ("03", "08")]  # fmt: skip


@pytest.mark.parametrize("lists", ["clean", "absent"])
def test_version_2_of_the_proposed_split_is_the_same_split(tmp_path: Path, listing: Listing, lists: str) -> None:
    root = write_root(tmp_path / "v2")
    file = xlsa17_folder(SPEC, root) / "att_splits.mat"
    assert proposed_split_version(file.parent) == 1
    tables = {key: value for key, value in loadmat(file).items() if not key.startswith("__")}
    for key in ("train_loc", "val_loc"):
        if lists == "clean":
            tables[key] = np.intersect1d(tables[key], tables["trainval_loc"])
        else:
            del tables[key]
    savemat(file, tables)
    assert proposed_split_version(file.parent) == 2
    second = listing_of(root)
    assert second.origin == {"proposed_split": 2, "test_seen_in_train_or_val_loc": 0}
    assert second.images.equals(listing.images)
    for which in ("standard", "development"):
        assert split_of(second, split=which).images.equals(split_of(listing, split=which).images)


def test_missing_photos_of_sun_tell_of_its_double(listing: Listing) -> None:
    sun = replace(listing, hint=CATALOG["sun"].mistaken_for)
    with pytest.raises(DataError, match=r"6 of 54 .*SUN397 is another data set: .*Missing:\n  images/e/e00\.png"):
        split_of(sun, np.array(["/e/" not in file for file in FILES]))


def test_held_out_images_follow_the_seed_class_by_class(listing: Listing) -> None:
    first = paths(split_of(listing), "val_seen")
    assert paths(split_of(listing), "val_seen") == first
    assert paths(split_of(listing, seed=1), "val_seen") != first
    shuffled = replace(listing, images=listing.images.sample(frac=1, random_state=0, ignore_index=True))
    assert paths(split_of(shuffled), "val_seen") == first
    without_a = np.array(["/a/" not in file for file in FILES])
    fewer = split_of(listing, without_a, allow_missing=True)
    assert paths(fewer, "val_seen") == [path for path in first if "/a/" not in path]


def test_missing_photos_are_counted_and_named(listing: Listing) -> None:
    present = np.ones(len(FILES), bool)
    present[[0, 3, 50]] = False  # a00 trainval, a03 test_seen, e02 test_unseen
    with pytest.raises(DataError, match=r"3 of 54 listed photos are missing.*allow-missing(.|\n)*a/a03"):
        split_of(listing, present)
    with pytest.raises(DataError, match=r"1 of 40 listed photos are missing"):
        split_of(listing, present, split="development")
    split = split_of(listing, present, allow_missing=True)
    assert split.missing == ["images/a/a00.png", "images/a/a03.png", "images/e/e02.png"]
    assert len(split.images) == 51
    assert split.dropped_classes == []


def test_class_without_photos_is_dropped(listing: Listing) -> None:
    present = np.array(["/b/" not in file for file in FILES])
    split = split_of(listing, present, allow_missing=True, split="development")
    assert split.dropped_classes == ["b"]
    assert split.classes["name"].tolist() == ["d", "a", "c"]
    assert sorted(split.images["class_id"].unique()) == [0, 1, 2]


def test_absent_test_photos_suggest_the_development_split(listing: Listing) -> None:
    present = np.array(["/e/" not in file for file in FILES])
    with pytest.raises(DataError, match=r"role test_unseen; set data\.split=development"):
        split_of(listing, present, allow_missing=True)
    with pytest.raises(DataError, match=r"none of the 54 listed photos is there"):
        split_of(listing, np.zeros(len(FILES), bool), allow_missing=True)
    with pytest.raises(DataError, match=r"role val_seen; .* larger data\.val_seen_fraction"):
        split_of(listing, val_seen_fraction=0.0)


def test_overlap_of_roles_is_refused(listing: Listing) -> None:
    split, data = split_of(listing), DataConfig()
    twice = split.images.copy()
    twice.loc[0, "path"] = twice.loc[1, "path"]
    with pytest.raises(DataError, match="two roles"):
        check_split(replace(split, images=twice), data)
    seen = split.images.copy()
    seen.loc[seen["role"] == "test_unseen", "role"] = "train"
    with pytest.raises(DataError, match="test_unseen classes have images of the roles train"):
        check_split(replace(split, images=seen), data)


NUMBERS = np.arange(1, len(FILES) + 1)
SWAPPED = [file.replace("/a/", "/b/") if file.endswith("a00.png") else file for file in FILES]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([ORDER.index(file.split("/")[1]) for file in FILES])}, r"labels: .* 1\.\.5 \(1-based\)"),
        ({"test_unseen_loc": NUMBERS[-6:] + 1}, r"test_unseen_loc: expected indices in 1\.\.54 .* found 50\.\.55"),
        ({"test_unseen_loc": NUMBERS[-6:] - 1}, r"1 images of test_unseen_loc are in another part"),
        ({"test_unseen_loc": NUMBERS[-5:]}, r"expected 6 as distinct indices in test_unseen_loc, found 5"),
        ({"testclasses": ["d"]}, r"train and validation classes of fold 1 don't part the seen classes"),
        ({"testclasses": ["e", "d"]}, r"expected 1 as classes, found 2"),
        ({"trainclasses2": ["a", "b", "c", "d"]}, r"classes of fold 2 don't part"),
        ({"valclasses3": ["heron"]}, r"valclasses3\.txt: 'heron' is not among"),
        ({"att": np.zeros((5, 3))}, r"expected \(3, 5\) as shape of att, found \(5, 3\)"),
        ({"image_files": np.array([f"CUB_200_2011/{f}" for f in SWAPPED], object)}, r"b/a00\.png is labelled a"),
        ({"image_files": np.array([f"elsewhere/{f}" for f in FILES], object)}, r"has no folder 'CUB_200_2011'"),
        ({"att": np.full((3, 5), np.nan)}, r"att_splits\.mat: att: expected finite numbers"),
        ({"att": np.ones((3, 5)) * 1j}, r"att_splits\.mat: att: expected finite numbers"),
        ({"att": np.array([["a"]] * 3, object)}, r"att_splits\.mat: att: expected finite numbers"),
        ({"test_unseen_loc": NUMBERS[-6:] - 0.5}, r"test_unseen_loc: expected whole numbers"),
        ({"test_unseen_loc": np.array([["a"]], object)}, r"test_unseen_loc: expected finite numbers"),
        ({"allclasses_names": NUMBERS}, r"allclasses_names: expected a cell array of strings"),
        ({"allclasses_names": np.array([["a"], [""]], object)}, r"allclasses_names: expected a cell array of strings"),
    ],
)
def test_listing_that_is_not_the_original_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listing_of(write_root(tmp_path, **change))


def test_unseen_images_swapped_for_seen_ones_are_refused(tmp_path: Path) -> None:
    listing_of(write_root(tmp_path))
    trainval = np.array([n for n in NUMBERS if n <= 48 and FILES[n - 1][-6:-4] not in ("03", "08")])
    trainval[-1], unseen = 54, np.array([48, 49, 50, 51, 52, 53])  # sizes and disjointness still hold
    with pytest.raises(DataError, match="the classes of trainval_loc are not those"):
        listing_of(write_root(tmp_path, trainval_loc=trainval, test_unseen_loc=unseen))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    folder = xlsa17_folder(SPEC, root)
    (folder / "valclasses1.txt").unlink()
    with pytest.raises(DataError, match=r"valclasses1\.txt does not exist"):
        listing_of(root)
    (folder / "res101.mat").write_bytes(b"<html>moved</html>" * 20)
    with pytest.raises(DataError, match=r"res101\.mat is not a readable MATLAB file"):
        listing_of(root)
    (folder / "res101.mat").unlink()
    with pytest.raises(DataError, match=r"res101\.mat does not exist"):
        listing_of(root)


def test_a_small_file_that_claims_to_hold_much_is_not_read(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    file = xlsa17_folder(SPEC, root) / "att_splits.mat"
    variables = {key: value for key, value in loadmat(file).items() if not key.startswith("_")}
    savemat(file, variables | {"att": np.zeros((3200, 3200), np.uint8)}, do_compression=True)
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"att_splits\.mat: no variable allclasses_names, att.* of a sane size"):
        listing_of(root)


def test_paths_are_matched_from_the_last_dataset_folder_on() -> None:
    assert relative_path("/BS/CUB_200_2011/CUB_200_2011/images/001.A/x.jpg", "CUB_200_2011") == "images/001.A/x.jpg"
    assert relative_path("Animals_with_Attributes2//JPEGImages/ox/1.jpg", "Animals_with_Attributes2") == (
        "JPEGImages/ox/1.jpg"
    )
    assert relative_path(r"C:\SUN\images\c\chapel\indoor\x.jpg", "images") == "c/chapel/indoor/x.jpg"


def test_attribute_names_come_from_numbered_lines_or_a_cell_array(tmp_path: Path) -> None:
    text, cells = tmp_path / "predicates.txt", tmp_path / "attributes.mat"
    text.write_text("    1\tblack\n    2\tlong leg\n")
    savemat(cells, {"attributes": np.array([["black"], ["long leg"]], object)})
    assert read_attribute_names(text, 2) == read_attribute_names(cells, 2) == ["black", "long leg"]
    text.write_text("2D Boxy\n\nFurn. Leg\n")  # aPY's are not numbered
    assert read_attribute_names(text, 2) == ["2D Boxy", "Furn. Leg"]
    with pytest.raises(DataError, match="expected 3 as distinct attribute names, found 2"):
        read_attribute_names(text, 3)
    text.write_text("2 long leg\n1 black\n")
    with pytest.raises(DataError, match="line 1: expected '1 <name>', found '2 long leg'"):
        read_attribute_names(text, 2)


@pytest.mark.parametrize("place", ["CUB_200_2011", "cub/CUB_200_2011", "CUB/CUB_200_2011"])
def test_archives_are_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    with pytest.raises(DataError, match=rf"Tried:(.|\n)*{tmp_path / place}"):
        photo_folder(SPEC, tmp_path)
    (tmp_path / place).mkdir(parents=True)
    assert photo_folder(SPEC, tmp_path) == tmp_path / place
    beside = (tmp_path / place).parent / "attributes.txt"
    beside.write_text("1 size\n")
    assert attribute_file(SPEC, tmp_path) == beside


def test_catalog_adds_up_to_the_published_totals() -> None:
    assert {name: spec.images for name, spec in CATALOG.items()} == {
        "cub": 11788,
        "awa2": 37322,
        "sun": 14340,
        "apy": 15339,
    }


def write_photos(root: Path) -> None:
    for number, file in enumerate(FILES):
        photo = root / "cub" / "CUB_200_2011" / file
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (number, 0, 0)).save(photo)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(CATALOG, "cub", SPEC)
    write_photos(write_root(tmp_path))
    data = DataConfig(dataset="cub", root=str(tmp_path), store_size=10, image_size=8, val_seen_fraction=0.2)
    return Config(data=data)


def test_bundle_holds_the_resized_photos_of_the_listing(config: Config, tmp_path: Path) -> None:
    bundle = prepare.prepare_data(config, tmp_path / "out")
    assert len(bundle.split) == 54
    for row, path in enumerate(bundle.split["path"]):
        image = bundle.image(row)
        assert image.shape == (10, 15, 3)  # 20x30 with the shorter side at 10
        assert (image == [FILES.index(path), 0, 0]).all()
    assert bundle.info["counts"]["images"] == {
        "train": 24, "val_seen": 6, "val_unseen": 10, "test_seen": 8, "test_unseen": 6
    }  # fmt: skip
    assert bundle.info["settings"]["store_size"] == 10
    assert bundle.info["source"]["test_seen_in_train_or_val_loc"] == 8
    config.data.store_size = 0
    assert prepare.prepare_data(config, tmp_path / "whole").image(0).shape == (20, 30, 3)


def test_finished_bundle_is_not_made_again_nor_replaced_by_one_of_other_settings(
    config: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stamp() -> int:
        prepare.prepare_data(config, out)
        return (out / "bundle.json").stat().st_ino

    first = stamp()
    config.data.root = str((tmp_path / "cub" / "..").absolute())  # same content by another name
    assert stamp() == first
    config.data.seed = 1
    with pytest.raises(DataError, match=r"out holds another bundle \(data.seed=0 instead of 1\); give another --out"):
        stamp()
    (tmp_path / "cub/CUB_200_2011" / FILES[0]).unlink()
    config.data.allow_missing = True
    info = prepare.prepare_data(config, tmp_path / "other").info
    assert info["missing"] == [FILES[0]] and info["counts"]["missing"] == 1


def test_unreadable_photos_are_named_together(config: Config, tmp_path: Path) -> None:
    photos = tmp_path / "cub/CUB_200_2011"
    (photos / FILES[4]).write_bytes(b"not a photo")
    (photos / FILES[40]).write_bytes((photos / FILES[40]).read_bytes()[:60])  # a truncated download
    with pytest.raises(DataError, match=rf"2 photos (.|\n)*{FILES[4]}(.|\n)*{FILES[40]}"):
        prepare.prepare_data(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decoding_gives_upright_rgb(tmp_path: Path) -> None:
    grey, turned = tmp_path / "grey.png", tmp_path / "turned.jpg"
    Image.new("L", (6, 4), 9).save(grey)
    assert decode(grey, 0).tolist() == np.full((4, 6, 3), 9).tolist()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.new("RGB", (60, 40)).save(turned, exif=exif)
    assert decode(turned, 20).shape == (30, 20, 3)


def test_real_data_need_a_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set"):
        prepare.prepare_data(Config(data=DataConfig(dataset="sun")), tmp_path / "out")
