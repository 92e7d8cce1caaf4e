from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svip.config import Config, ConfigError, DataConfig
from svip.data import synthetic
from svip.data.bundle import Bundle
from svip.data.errors import DataError
from svip.data.prepare import prepare_data
from svip.data.synthetic import COLORS, GROUPS, class_descriptions, draw_figure, render, write_synthetic
from svip.semantics.attributes import Rules, attribute_phrases
from svip.semantics.vectors import embed_attributes

CONFIG = DataConfig(store_size=32, seed=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_synthetic(CONFIG, tmp_path_factory.mktemp("synthetic") / "bundle")


def test_counts_follow_from_classes_and_fractions(bundle: Bundle) -> None:
    # 40 train, 10 validation and 10 unseen classes; 15 % of 30 images are 4.5, rounded to the even 4
    assert bundle.info["counts"]["classes"] == {"train": 40, "val_unseen": 10, "test_unseen": 10}
    assert bundle.info["counts"]["images"] == {
        "train": 40 * 26,
        "val_seen": 40 * 4,
        "val_unseen": 10 * 30,
        "test_seen": 50 * 8,
        "test_unseen": 10 * 30,
    }
    assert len(bundle.attribute_names) == 35
    assert bundle.image(0).shape == (32, 32, 3)


def test_images_of_unseen_classes_are_only_for_testing(bundle: Bundle) -> None:
    class_ids = bundle.split["class_id"].to_numpy()
    unseen = set(bundle.classes_with("test_unseen").tolist())
    assert set(class_ids[bundle.rows("test_unseen")]) == unseen
    assert set(class_ids[bundle.rows("train", "val_seen", "val_unseen", "test_seen")]) == set(range(60)) - unseen
    assert set(class_ids[bundle.rows("val_unseen")]).isdisjoint(class_ids[bundle.rows("train", "val_seen")])


@pytest.fixture
def one_image_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINVAL_IMAGES", "TEST_SEEN_IMAGES", "TEST_UNSEEN_IMAGES"):
        monkeypatch.setattr(synthetic, name, 1)


@pytest.mark.usefixtures("one_image_a_role")
def test_same_seed_gives_the_same_bundle_and_another_seed_another(tmp_path: Path) -> None:
    first, second = (write_synthetic(CONFIG, tmp_path / name) for name in ("first", "second"))
    other = write_synthetic(dataclasses.replace(CONFIG, seed=4), tmp_path / "other")
    assert first.sha256 == second.sha256 != other.sha256
    assert not np.array_equal(first.image(0), other.image(0))


@pytest.mark.usefixtures("one_image_a_role")
def test_preparing_again_does_nothing_and_with_other_settings_is_refused(tmp_path: Path) -> None:
    def prepare(**changes: object) -> int:
        config = Config(data=dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
        return (prepare_data(config, tmp_path / "out").path / "images.bin").stat().st_ino

    first = prepare()
    assert prepare() == first
    with pytest.raises(DataError, match=r"out holds another bundle \(data.fold=1 instead of 2\); give another --out"):
        prepare(fold=2)
    assert prepare() == first


@pytest.mark.usefixtures("one_image_a_role")
def test_an_image_depends_on_no_other_image(bundle: Bundle, tmp_path: Path) -> None:
    few = write_synthetic(CONFIG, tmp_path / "few")  # 2 images a seen class instead of 38
    assert np.array_equal(few.image(2), bundle.image(38))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unseen_classes_are_new_combinations_of_values_seen_in_training(seed: int) -> None:
    classes = class_descriptions(seed)
    assert len({tuple(item.values()) for item in classes}) == 60
    assert len({synthetic.class_name(item) for item in classes}) == 60
    assert min(sum(one[g] != two[g] for g in GROUPS) for one, two in combinations(classes, 2)) >= 4
    for first_validation_class in (0, 10, 20):
        train = [item for i, item in enumerate(classes[:50]) if not 0 <= i - first_validation_class < 10]
        for item in classes[50:]:
            for group, value in item.items():
                assert sum(other[group] == value for other in train) >= 2


@pytest.mark.usefixtures("one_image_a_role")
def test_fold_moves_the_validation_classes_but_no_pixel(tmp_path: Path) -> None:
    first, third = (write_synthetic(dataclasses.replace(CONFIG, fold=fold), tmp_path / str(fold)) for fold in (1, 3))
    assert first.classes_with("val_unseen").tolist() == list(range(10))
    assert third.classes_with("val_unseen").tolist() == list(range(20, 30))
    assert (third.path / "images.bin").read_bytes() == (first.path / "images.bin").read_bytes()


def test_class_attributes_say_one_value_of_each_group(bundle: Bundle) -> None:
    groups = [name.split("::")[0] for name in bundle.attribute_names]
    for group in set(groups):
        columns = [i for i, other in enumerate(groups) if other == group]
        assert bundle.class_attributes[:, columns].sum(1).tolist() == [1.0] * 60
    assert len(np.unique(bundle.class_attributes, axis=0)) == 60


def test_masks_cover_a_tenth_to_six_tenths_of_each_image(bundle: Bundle) -> None:
    cover = np.array([np.asarray(bundle.mask(row)).mean() for row in range(len(bundle.split))])
    assert cover.min() > 0.10 and cover.max() < 0.60
    assert 0.20 < np.median(cover) < 0.40


def test_mask_lies_where_the_object_is_colourful() -> None:
    seen = []
    for class_id, description in enumerate(class_descriptions(0)[:20]):
        image, mask = render(description, np.random.default_rng((0, class_id, 0)), 64)
        chroma = np.ptp(image.astype(int), axis=2)  # largest minus smallest channel: grey is 0
        seen.append((np.median(chroma[mask == 1]), np.median(chroma[mask == 0])))
    inside, outside = np.array(seen).T
    assert (inside > 100).all()
    assert (inside > 2 * outside).all()


@pytest.mark.parametrize("color", list(COLORS))
def test_body_has_the_colour_that_its_attribute_names(color: str) -> None:
    other = "red" if color != "red" else "blue"
    description = {group: values[0] for group, values in GROUPS.items()}
    description |= {"body_color": color, "wing_color": other, "head_color": other, "size": "large"}
    image, mask = render(description, np.random.default_rng(0), 64)
    pixels = image[mask == 1].astype(float)
    pixels /= pixels.max(1, keepdims=True)  # free of the exposure
    names = list(COLORS)
    palette = np.array([COLORS[name] for name in names], float)
    palette /= palette.max(1, keepdims=True)
    nearest = np.abs(pixels[:, None] - palette).sum(2).argmin(1)
    share = np.bincount(nearest, minlength=6) / len(nearest)
    assert share[names.index(color)] > 0.3  # the head and the wing take the rest
    assert share[names.index(color)] + share[names.index(other)] > 0.8


def test_larger_sizes_cover_more() -> None:
    description = {group: values[0] for group, values in GROUPS.items()}
    cover = [
        np.mean([render(description | {"size": size}, np.random.default_rng(i), 64)[1].mean() for i in range(5)])
        for size in ("small", "medium", "large")
    ]
    assert cover[1] > 1.3 * cover[0] and cover[2] > 1.2 * cover[1]


def test_bundle_brings_a_word_vector_for_every_word_of_its_attributes(bundle: Bundle) -> None:
    phrases = attribute_phrases(bundle.attribute_names, Rules())
    embedding = embed_attributes(phrases, bundle.attribute_names, bundle.path / "word_vectors.txt")
    assert embedding.vectors.shape == (35, 50)
    assert embedding.report["missing_words"] == {}


def test_colour_words_are_nearer_to_each_other_than_to_shapes() -> None:
    lines = [line.split() for line in synthetic.word_vectors().splitlines()]
    vectors = {word: np.array(numbers, float) for word, *numbers in lines}

    def cosine(one: str, two: str) -> float:
        a, b = vectors[one], vectors[two]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert np.mean([cosine(a, b) for a, b in combinations(COLORS, 2)]) > 0.3
    assert abs(np.mean([cosine(a, b) for a in COLORS for b in ("square", "triangular", "forked")])) < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "development"}, "data.split='development'"),
        ({"store_size": 16}, "data.store_size=16.*at least 32"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_settings_it_can_not_have_are_refused_and_leave_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_synthetic(dataclasses.replace(CONFIG, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_figure_is_a_small_readable_picture(tmp_path: Path) -> None:
    draw_figure(tmp_path / "figures" / "synthetic.png")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["synthetic.png"]
    assert (tmp_path / "figures" / "synthetic.png").stat().st_size < 250_000
    with Image.open(tmp_path / "figures" / "synthetic.png") as picture:
        assert 1100 < picture.width < 1300
