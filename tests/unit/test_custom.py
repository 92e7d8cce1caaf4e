"""Data sets of one's own: ten classes of ten 8 x 8 photos, and tables that are wrong in one place each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from svip.config import Config, ConfigError, DataConfig, load_config
from svip.data.custom import read_custom
from svip.data.errors import DataError
from svip.data.prepare import prepare_data
from svip.data.splits import Split, make_split
from svip.semantics.attributes import Rules, attribute_phrases
from svip.semantics.groups import attribute_groups

CLASSES = [f"class {letter}" for letter in "abcdefghij"]
Change = Callable[[pd.DataFrame], pd.DataFrame]


def classes_table(**columns: list[str]) -> pd.DataFrame:
    numbers = pd.DataFrame({"color::red": range(1, 11), "color::blue": [0.5] * 10})
    return pd.concat([pd.DataFrame({"class": CLASSES, **columns}), numbers], axis=1)


def images_table(**columns: list[str]) -> pd.DataFrame:
    paths = [f"{name[-1]}/{index}.png" for name in CLASSES for index in range(10)]
    return pd.DataFrame({"path": paths, "class": np.repeat(CLASSES, 10).astype(str), **columns})


def write(folder: Path, classes: pd.DataFrame, images: pd.DataFrame) -> DataConfig:
    classes.to_csv(folder / "classes.csv", index=False)
    images.to_csv(folder / "images.csv", index=False)
    return DataConfig("custom", images=str(folder / "images.csv"), attributes=str(folder / "classes.csv"), store_size=0)


def split_of(folder: Path, classes: pd.DataFrame, images: pd.DataFrame, seed: int = 0) -> Split:
    config = dataclasses.replace(write(folder, classes, images), seed=seed)
    listing, _ = read_custom(config)
    return make_split(listing, config, np.ones(len(images), bool))


def count(split: Split) -> tuple[dict[str, int], dict[str, int]]:
    """Classes and images by role."""
    return split.classes["role"].value_counts().to_dict(), split.images["role"].value_counts().to_dict()


def test_a_split_is_made_by_the_seed_where_none_is_given(tmp_path: Path) -> None:
    split = split_of(tmp_path, classes_table(), images_table())
    # a fifth of 10 classes is unseen, and of 8 seen ones for validation (1.6, rounded to 2); a fifth of 10 images is
    # held out as test_seen; 15 % of the 8 left of each train class (1.2) as val_seen
    assert count(split) == (
        {"train": 6, "val_unseen": 2, "test_unseen": 2},
        {"train": 6 * 7, "val_seen": 6, "val_unseen": 2 * 8, "test_seen": 8 * 2, "test_unseen": 2 * 10},
    )
    assert split.classes["name"].tolist() == CLASSES
    assert split.classes["color::red"].tolist() == list(range(1, 11))
    again, other = (split_of(tmp_path, classes_table(), images_table(), seed) for seed in (0, 1))
    assert again.images.equals(split.images)
    assert not other.classes.equals(split.classes)


def test_the_column_split_decides_on_the_classes(tmp_path: Path) -> None:
    roles = ["train"] * 4 + ["val", "test"] * 3
    split = split_of(tmp_path, classes_table(split=roles), images_table())
    assert split.classes["role"].tolist() == ["train"] * 4 + ["val_unseen", "test_unseen"] * 3
    assert count(split)[1] == {"train": 28, "val_seen": 4, "val_unseen": 24, "test_seen": 14, "test_unseen": 30}


def test_parts_leave_only_validation_to_the_seed(tmp_path: Path) -> None:
    parts = (["trainval"] * 9 + ["test_seen"]) * 7 + ["test_unseen"] * 30
    split = split_of(tmp_path, classes_table(), images_table(role=parts))
    assert set(split.classes["name"][split.classes["role"] == "test_unseen"]) == set(CLASSES[7:])
    # 9 a train class: 15 % are 1.35; a fifth of 7 seen classes is 1.4, and 2 are the fewest
    assert count(split)[1] == {"train": 5 * 8, "val_seen": 5, "val_unseen": 18, "test_seen": 7, "test_unseen": 30}


def test_roles_leave_nothing_to_the_seed(tmp_path: Path) -> None:
    roles = (["train"] * 7 + ["val_seen"] * 2 + ["test_seen"]) * 5 + (["val_unseen"] * 9 + ["test_seen"]) * 2
    roles += ["test_unseen"] * 30
    splits = [split_of(tmp_path, classes_table(), images_table(role=roles), seed) for seed in (0, 1)]
    for split in splits:
        assert split.images["role"].tolist() == roles
        assert split.classes["role"].tolist() == ["train"] * 5 + ["val_unseen"] * 2 + ["test_unseen"] * 3


def test_photos_go_the_usual_way_into_a_bundle(tmp_path: Path) -> None:
    images = images_table()
    for number, path in enumerate(images["path"]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 2 * number, 255)).save(tmp_path / path)
    config = Config(data=write(tmp_path, classes_table(), images))
    bundle = prepare_data(config, tmp_path / "bundle")
    assert bundle.info["dataset"] == "custom"
    assert bundle.info["settings"]["unseen_fraction"] == 0.2
    assert "proposed_split" not in bundle.info["source"]
    assert bundle.split["path"].tolist() == images["path"].tolist()
    assert [bundle.image(row)[0, 0].tolist() for row in (0, 57)] == [[0, 0, 255], [57, 114, 255]]
    names = bundle.attribute_names
    assert attribute_phrases(names, Rules()) == [["color", "red"], ["color", "blue"]]
    assert attribute_groups("custom", names) == [[0, 1]]
    before = (tmp_path / "bundle" / "bundle.json").stat().st_mtime_ns
    prepare_data(config, tmp_path / "bundle")  # the same again: nothing to do
    assert (tmp_path / "bundle" / "bundle.json").stat().st_mtime_ns == before
    config.data.unseen_fraction = 0.3
    assert prepare_data(config, tmp_path / "another").sha256 != bundle.sha256
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 100 listed photos are missing(.|\n)*a/3\.png"):
        prepare_data(config, tmp_path / "bundle")


def test_other_roles_are_another_bundle(tmp_path: Path) -> None:
    images = images_table(
        role=(["train"] * 7 + ["val_seen"] * 2 + ["test_seen"]) * 5 + ["val_unseen"] * 20 + ["test_unseen"] * 30
    )
    for path in images["path"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    first = prepare_data(Config(data=write(tmp_path, classes_table(), images)), tmp_path / "bundle")
    images.loc[0, "role"] = "val_seen"
    changed = Config(data=write(tmp_path, classes_table(), images))
    with pytest.raises(DataError, match="holds another bundle .of other photos or another listing"):
        prepare_data(changed, tmp_path / "bundle")
    second = prepare_data(changed, tmp_path / "another")
    assert (first.split["role"][0], second.split["role"][0]) == ("train", "val_seen")


def test_parquet_tables_are_the_same_data_set(tmp_path: Path) -> None:
    config = write(tmp_path, classes_table(), images_table())
    classes_table().to_parquet(tmp_path / "classes.parquet")
    images_table().to_parquet(tmp_path / "images.parquet")
    other = dataclasses.replace(
        config, images=str(tmp_path / "images.parquet"), attributes=str(tmp_path / "classes.parquet")
    )
    (csv, csv_root), (parquet, parquet_root) = read_custom(config), read_custom(other)
    assert csv.images.equals(parquet.images) and csv_root == parquet_root == tmp_path
    np.testing.assert_array_equal(csv.attributes, parquet.attributes)
    holed = classes_table()
    holed.loc[3, "color::blue"] = np.nan
    holed.to_parquet(tmp_path / "classes.parquet")
    with pytest.raises(DataError, match=r"classes\.parquet: row 4, column 'color::blue': expected a number, found ''"):
        read_custom(other)
    assert read_custom(dataclasses.replace(config, root="/photos"))[1] == Path("/photos")


def put(row: int, column: str, value: object) -> Change:
    """A table with another value in one cell."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype(object)
        table.loc[row, column] = value
        return table

    return change


def columns(**names: str) -> Change:
    return lambda table: table.rename(columns=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "classes.csv: expected a header, and a line for each entry"),
        (columns(**{"class": "klass"}), "missing column 'class' (nearest: 'klass')"),
        (lambda table: table[["class"]], "classes.csv: no attributes. Expected columns: class, a column of numbers"),
        (columns(**{"color::red": ""}), "column 2 has no name; leave it out, or name it"),
        (lambda _: images_table(), "found 'a/0.png'"),
        (lambda _: images_table(), "Is this the table of images (--images)?"),
        (columns(**{"color::blue": "color::red"}), "column 'color::red' stands there 2 times"),
        (put(2, "class", ""), "line 4: the class has no name"),
        (put(2, "class", "class a"), "line 4: 'class a' is already the class of line 2"),
        (put(5, "color::red", "much"), "line 7, column 'color::red': expected a number, found 'much'"),
        (put(5, "color::red", ""), "line 7, column 'color::red': expected a number, found ''"),
        (put(5, "color::red", "inf"), "line 7, column 'color::red': expected a number, found 'inf'"),
        (put(5, "color::red", "nan"), "line 7, column 'color::red': expected a number, found 'nan'"),
        (
            lambda table: put(0, "color::red", 0)(put(0, "color::blue", 0)(table)),
            "line 2: all attributes of 'class a' are 0",
        ),
        (put(0, "color::red", 2), "class a, class b: the same attributes, so they can't be told apart"),
        (put(3, "class", "class q"), "images.csv: line 32, column 'class': 'class d' is not in"),
        (lambda table: table.iloc[:5], "'class f' is not in"),
        (lambda table: table.assign(split="seen"), "line 2, column 'split': expected one of val, test, train"),
        (lambda table: table.assign(split=["train"] * 8 + ["val"] + ["test"]), "1 of 10 classes are val_unseen"),
    ],
)
def test_bad_tables_of_classes_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    config = write(tmp_path, change(classes_table()), images_table())
    with pytest.raises(DataError, match=re.escape(message)):
        read_custom(config)


ROLES = (["trainval"] * 9 + ["test_seen"]) * 7 + ["test_unseen"] * 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "images.csv: expected a header, and a line for each entry"),
        (columns(path="file"), "missing column 'path'"),
        (columns(role="rolle"), "unknown column 'rolle' (nearest: 'role')"),
        (put(7, "path", ""), "line 9: expected a path and a class"),
        (put(7, "class", ""), "line 9: expected a path and a class"),
        (put(7, "path", "a/3.png"), "line 9, column 'path': 'a/3.png' is already in line 5"),
        (put(7, "path", "./a//3.png"), "line 9, column 'path': 'a/3.png' is already in line 5"),
        (put(7, "path", "a/" + "b" * 256), "line 9, column 'path': 'a/bbb"),
        (put(7, "path", "a\0b.png"), "can't be the path of a file"),
        (put(7, "path", "/tmp/3.png"), "line 9, column 'path': '/tmp/3.png' leaves the data set's folder"),
        (put(7, "path", "../3.png"), "line 9, column 'path': '../3.png' leaves the data set's folder"),
        (put(7, "class", "class A"), "line 9, column 'class': 'class A' is not in"),
        (put(7, "role", "testing"), "line 9, column 'role': expected one of trainval, test_seen, test_unseen"),
        (put(7, "role", "train"), "line 9, column 'role': expected one of trainval, test_seen, test_unseen, found"),
        (lambda table: table.assign(role="test"), "line 2, column 'role': expected one of train, val_seen"),
        (
            lambda table: table.assign(role=["train", "val_unseen"] * 35 + ["test_unseen"] * 30),
            "line 2, column 'role': train, but its class 'class a' is val_unseen",
        ),
        (put(99, "role", "trainval"), "line 101, column 'role': trainval, but its class 'class j' is test_unseen"),
        (lambda table: table[table["class"] != "class c"], "no image of class c"),
        (lambda table: table.assign(role="trainval"), "0 of 10 classes are test_unseen; expected 2 or more"),
    ],
)
def test_bad_tables_of_images_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    config = write(tmp_path, classes_table(), change(images_table(role=ROLES)))
    with pytest.raises(DataError, match=re.escape(message)):
        read_custom(config)


def test_rows_of_another_length_and_foreign_files_are_refused(tmp_path: Path) -> None:
    config = write(tmp_path, classes_table(), images_table())
    table = tmp_path / "classes.csv"
    table.write_text(table.read_text().replace("class b,2,0.5", "class b,2"))
    with pytest.raises(DataError, match=r"classes\.csv: line 3: expected 3 cells, found 2"):
        read_custom(config)
    classes_table().to_csv(table, sep=";", decimal=",", index=False)
    with pytest.raises(DataError, match=r"classes\.csv: its cells are separated by ';'; save it with commas"):
        read_custom(config)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"classes\.csv is not a CSV in UTF-8"):
        read_custom(config)
    table.unlink()
    with pytest.raises(DataError, match=r"can't read the table .*classes\.csv"):
        read_custom(config)
    (tmp_path / "classes.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"can't read the table .*classes\.parquet"):
        read_custom(dataclasses.replace(config, attributes=str(tmp_path / "classes.parquet")))


def test_a_role_that_no_image_has_is_named_with_what_to_do(tmp_path: Path) -> None:
    roles = ["trainval"] * 70 + ["test_unseen"] * 30
    with pytest.raises(DataError, match=r"no photo is left for the role test_seen; .*some where .* column role"):
        split_of(tmp_path, classes_table(), images_table(role=roles))


def test_settings_that_no_table_can_fill_are_refused(tmp_path: Path) -> None:
    config = write(tmp_path, classes_table(), images_table())
    for key, value in {"images": "images.csv", "attributes": "classes.csv", "like": "cub"}.items():
        real = load_config("paper/cub", [f"data.{key}={value}"])
        with pytest.raises(ConfigError, match=rf"data\.{key} is for (custom|synthetic) data only, not for cub"):
            prepare_data(real, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.mirror=web: there is nothing to fetch of custom data"):
        prepare_data(Config(data=dataclasses.replace(config, mirror="web")), tmp_path / "out")
    changes: dict[str, Any]
    for changes, message in (
        ({"images": None}, "needs both tables"),
        ({"split": "development"}, "one standard split"),
        ({"fold": 2}, "another data.seed"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_custom(dataclasses.replace(config, **changes))


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    # 12 classes: 2 unseen, 2 of 10 for validation; 8 images, of which 2 are test_seen and 1 of the 6 left val_seen
    assert names["bundle"].info["counts"]["images"] == {
        "train": 8 * 5,
        "val_seen": 8,
        "val_unseen": 2 * 6,
        "test_seen": 10 * 2,
        "test_unseen": 2 * 8,
    }
    assert load_config("paper/cub").data.store_size == names["bundle"].split["height"].min()
