"""Data of a real data set's size: counts by plan, pixels by a few images of a small stand-in."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from svip.config import Config, ConfigError, DataConfig
from svip.data import scale
from svip.data.bundle import Bundle
from svip.data.catalog import CATALOG
from svip.data.errors import DataError
from svip.data.prepare import prepare_data
from svip.semantics.attributes import Rules, attribute_phrases
from svip.semantics.vectors import embed_attributes

CONFIG = DataConfig(like="cub", store_size=48, seed=3)
SMALL = dataclasses.replace(
    CATALOG["cub"],
    classes=40,
    unseen_classes=8,
    val_classes=8,
    attributes=40,
    trainval=330,
    test_seen=33,
    test_unseen=80,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "cub", SMALL)


def write(out: Path, **changes: object) -> Bundle:
    return scale.write_scale(dataclasses.replace(CONFIG, **changes), out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "classes", "parts"),
    [  # Xian et al., Tables 1 and 2
        ("cub", {"train": 100, "val_unseen": 50, "test_unseen": 50}, (7057, 1764, 2967)),
        ("awa2", {"train": 27, "val_unseen": 13, "test_unseen": 10}, (23527, 5882, 7913)),
        ("sun", {"train": 580, "val_unseen": 65, "test_unseen": 72}, (10320, 2580, 1440)),
    ],
)
@pytest.mark.parametrize("fold", [1, 3])
def test_counts_are_those_of_the_real_data_set(
    name: str, classes: dict[str, int], parts: tuple[int, int, int], fold: int
) -> None:
    spec = CATALOG[name]
    class_roles = scale.roles_of_classes(spec, fold)
    assert Counter(class_roles) == classes
    pictures = list(scale.plan(spec, class_roles, 0.15))
    roles = Counter(picture.role for picture in pictures)
    found = (roles["train"] + roles["val_seen"] + roles["val_unseen"], roles["test_seen"], roles["test_unseen"])
    assert found == parts
    of_class = Counter(picture.class_id for picture in pictures)
    assert len(of_class) == spec.classes
    for unseen in (False, True):  # evenly: no class has more than one image of a part beyond another
        counts = [of_class[i] for i, role in enumerate(class_roles) if (role == "test_unseen") is unseen]
        assert max(counts) - min(counts) <= 2
    values, matrix = scale.class_values(spec, 0)
    assert matrix.shape == (spec.classes, spec.attributes)
    assert len(np.unique(matrix, axis=0)) == spec.classes
    names = scale.attribute_names(spec.attributes)
    assert len(set(names)) == len(names) == spec.attributes
    assert values.max() == 5


@pytest.mark.usefixtures("small")
def test_same_seed_gives_the_same_bundle(tmp_path: Path) -> None:
    first, second, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first.sha256 == second.sha256 != other.sha256
    assert first.info["counts"]["images"]["test_unseen"] == 80
    assert first.info["settings"]["like"] == "cub"
    sides = first.split[["height", "width"]]
    assert (sides.min(axis=1) == 48).all()
    assert sides.max(axis=1).between(48, 64).all() and sides.max(axis=1).nunique() > 5
    through = prepare_data(SimpleNamespace(data=CONFIG), tmp_path / "d")  # type: ignore[arg-type]
    assert through.sha256 == first.sha256


@pytest.mark.usefixtures("small")
def test_attributes_can_be_read_off_the_pictures(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle")

    def features(rows: np.ndarray) -> np.ndarray:
        small = [np.asarray(Image.fromarray(bundle.image(row)).resize((9, 9))) for row in rows]
        return np.stack(small).reshape(len(rows), -1) / 255 - 0.5

    train, test = bundle.rows("train", "val_seen", "val_unseen"), bundle.rows("test_unseen")
    class_ids = bundle.split["class_id"].to_numpy()
    x, y = features(train), bundle.class_attributes[class_ids[train]]
    weights = np.linalg.solve(x.T @ x + 0.3 * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))  # ridge regression
    unseen = bundle.classes_with("test_unseen")
    prototypes = bundle.class_attributes[unseen] - y.mean(0)
    guess = unseen[((features(test) @ weights) @ prototypes.T).argmax(1)]
    assert (guess == class_ids[test]).mean() > 0.5  # chance is 1 in 8


@pytest.mark.usefixtures("small")
def test_the_bundle_brings_a_vector_for_each_word(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle")
    phrases = attribute_phrases(bundle.attribute_names, Rules())
    embedding = embed_attributes(phrases, bundle.attribute_names, bundle.path / "word_vectors.txt")
    assert embedding.report["missing_words"] == {}
    assert len(np.unique(embedding.vectors, axis=0)) == 40


def test_what_it_can_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="only the standard split"):
        write(tmp_path / "out", split="development")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(DataError, match=r"0\.0 GB free, 0\.\d needed"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_preparing_again_does_nothing_and_with_other_settings_is_refused(tmp_path: Path) -> None:
    def prepare(**changes: object) -> int:
        config = Config(data=dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
        return (prepare_data(config, tmp_path / "out").path / "images.bin").stat().st_ino

    first = prepare()
    assert prepare() == first
    with pytest.raises(DataError, match=r"out holds another bundle \(data.seed=3 instead of 4\); give another --out"):
        prepare(seed=4)
    assert prepare() == first


@pytest.mark.usefixtures("small")
def test_as_many_threads_draw_as_the_container_has_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    class Noted(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            counts.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(scale, "ThreadPoolExecutor", Noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    write(tmp_path / "out")
    assert counts == [3]
