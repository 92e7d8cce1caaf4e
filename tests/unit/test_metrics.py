"""Accuracies counted by hand, the protocols, and the evaluation of an untrained checkpoint on a tiny bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svip.config import Config, load_config
from svip.data.bundle import Bundle, BundleWriter
from svip.evaluation.evaluate import evaluate, protocols, report, selection_against_masks
from svip.evaluation.inference import Predictions, frozen_features, predict
from svip.evaluation.metrics import (
    chance,
    harmonic_mean,
    per_class_accuracy,
    published_metrics,
    unseen_accuracy,
    zero_shot_metrics,
)
from svip.models.svip import SVIP
from svip.training.checkpoint import CheckpointError, save_model, save_weights

LABELS = np.array([0, 0, 0, 0, 1, 2, 2, 2, 3])
SCORES = np.array(
    [
        [9.0, 0, 1, 0],  # 0, right
        [9.0, 0, 1, 0],  # 0, right
        [9.0, 0, 1, 0],  # 0, right
        [5.0, 0, 4.5, 0],  # 0, right while gamma is below 0.5
        [6.0, 3, 0, 1],  # 1, wrong
        [0.0, 1, 3, 2],  # 2, right
        [3.0, 0, 2, 1],  # 2, right among unseen classes, among all from gamma = 1 on
        [0.0, 3, 1, 2],  # 2, wrong
        [1.0, 0, 0, 2],  # 3, right
    ]
)
UNSEEN = np.array([2, 3])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 20))
def test_the_published_protocol_is_its_grid_search_done_literally(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(5), random.integers(0, 5, 20)])
    scores = random.normal(scale=spread, size=(25, 5)) + spread * np.eye(5)[labels]
    unseen = np.array([1, 4])
    shares = torch.tensor(scores).softmax(1).numpy()
    of_unseen = np.isin(labels, unseen)
    best = (-1.0, 0.0, 0.0, 0.0)
    for offset in np.arange(-1, 1, 0.01):
        moved = shares.copy()
        moved[:, unseen] += offset
        right = moved.argmax(1) == labels
        u, s = right[of_unseen].mean(), right[~of_unseen].mean()
        h = 2 * u * s / (u + s) if u + s else 0.0
        if h > best[0]:
            best = (h, u, s, offset)
    found = published_metrics(scores, labels, unseen)
    assert [found[name] for name in ("H", "U", "S")] == pytest.approx([100 * value for value in best[:3]])
    assert found["gamma"] == pytest.approx(best[3])
    among_unseen = unseen[scores[of_unseen][:, unseen].argmax(1)]
    assert found["T1"] == pytest.approx(100 * (among_unseen == labels[of_unseen]).mean())


def test_the_published_protocol_counts_samples_and_not_classes() -> None:
    # class 0 has four images, three of them right at any offset below 0.04; class 1 has one
    found = published_metrics(SCORES, LABELS, UNSEEN)
    assert found["T1"] == pytest.approx(100 * 3 / 4)
    assert found["S"] in [pytest.approx(100 * part / 5) for part in range(6)]


def test_accuracy_is_the_mean_over_classes_and_not_over_images() -> None:
    metrics = zero_shot_metrics(SCORES, LABELS, UNSEEN, 0.0)
    assert metrics["S"] == pytest.approx(50)  # class 0: 4 of 4, class 1: 0 of 1; by image it would be 80
    assert metrics["U"] == pytest.approx(100 * (1 / 3 + 1) / 2)  # by image 50
    assert metrics["T1"] == pytest.approx(100 * (2 / 3 + 1) / 2)  # by image 75
    assert metrics["H"] == pytest.approx(400 / 7)  # 2 * 1/2 * 2/3 / (1/2 + 2/3) = 4/7
    assert metrics["gamma"] == 0


@pytest.mark.parametrize(
    ("gamma", "seen", "unseen"),
    [
        (0.499, 1 / 2, 2 / 3),
        (0.5, 3 / 8, 2 / 3),
        (0.999, 3 / 8, 2 / 3),
        (1, 3 / 8, 5 / 6),
        (8, 0, 5 / 6),
        (-3, 1 / 2, 0),
    ],
)
def test_gamma_comes_off_the_seen_scores_and_equality_goes_to_the_unseen_class(
    gamma: float, seen: float, unseen: float
) -> None:
    metrics = zero_shot_metrics(SCORES, LABELS, UNSEEN, gamma)
    assert (metrics["S"], metrics["U"]) == pytest.approx((100 * seen, 100 * unseen))
    assert metrics["T1"] == pytest.approx(100 * 5 / 6), "the choice among unseen classes knows no gamma"
    assert metrics["gamma"] == gamma


def test_classes_without_images_do_not_count() -> None:
    wider = np.concatenate([SCORES, np.full((9, 2), -1.0)], axis=1)
    assert zero_shot_metrics(wider, LABELS, np.array([5, 3, 2]), 0.5) == zero_shot_metrics(SCORES, LABELS, UNSEEN, 0.5)


def test_per_class_accuracy_is_nan_for_a_class_without_images() -> None:
    got = per_class_accuracy(np.array([0, 0, 1, 3, 3]), np.array([0, 1, 1, 1, 3]), 5)
    np.testing.assert_array_equal(got, [1, 1 / 3, np.nan, 1, np.nan])


def test_t1_looks_at_unseen_classes_only_whatever_the_order_of_their_ids() -> None:
    scores = np.array([[9.0, 1, 2, 3], [9, 3, 2, 1], [0, 1, 0, 2]])
    assert unseen_accuracy(scores, np.array([3, 1, 1]), np.array([3, 1])) == pytest.approx((1 + 1 / 2) / 2)


@pytest.mark.parametrize(("unseen", "seen", "expected"), [(0, 0, 0), (1, 0, 0), (0.5, 1, 2 / 3), (0.2, 0.6, 0.3)])
def test_harmonic_mean(unseen: float, seen: float, expected: float) -> None:
    assert harmonic_mean(unseen, seen) == pytest.approx(expected)
    assert harmonic_mean(seen, unseen) == pytest.approx(expected)


@given(st.floats(0.01, 1), st.floats(0.01, 1))
@settings(deadline=None)
def test_harmonic_mean_stays_near_the_lower_of_both(a: float, b: float) -> None:
    # the reciprocal of the mean of reciprocals: no more than their mean, and than twice the lower one
    h = harmonic_mean(a, b)
    assert 1 / h == pytest.approx((1 / a + 1 / b) / 2)
    assert min(a, b) - 1e-12 <= h <= min(2 * min(a, b), (a + b) / 2) + 1e-12


def test_chance_guesses_among_all_classes_or_the_unseen_ones() -> None:
    assert chance(150, 50) == {"T1": 2, "U": 0.5, "S": 0.5, "H": 0.5}


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [n, C], labels [n] and unseen class ids, with images of both kinds."""
    seen, unseen = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    labels = [0, seen, *draw(st.lists(st.integers(0, seen + unseen - 1), max_size=8))]
    score = st.integers(-3, 3).map(float)
    rows = st.lists(score, min_size=seen + unseen, max_size=seen + unseen)
    return np.array([draw(rows) for _ in labels]), np.array(labels), np.arange(seen, seen + unseen)


@given(problems(), st.integers(-7, 7).map(lambda n: n / 2))
@settings(deadline=None)
def test_what_holds_for_any_scores(problem: tuple[np.ndarray, np.ndarray, np.ndarray], gamma: float) -> None:
    scores, labels, unseen = problem
    got = zero_shot_metrics(scores, labels, unseen, gamma)
    t1, u, s, h = (got[name] for name in ("T1", "U", "S", "H"))
    assert -1e-9 <= u <= t1 + 1e-9 <= 100 + 2e-9, "who is right among all classes is so among the unseen ones"
    assert -1e-9 <= s <= 100 + 1e-9
    assert min(u, s) - 1e-9 <= h <= max(u, s) + 1e-9

    order = np.arange(len(labels))[::-1]
    assert zero_shot_metrics(scores[order], labels[order], unseen, gamma) == pytest.approx(got)
    twice = zero_shot_metrics(np.tile(scores, (2, 1)), np.tile(labels, 2), unseen, gamma)
    assert twice == pytest.approx(got), "a share, not a count"


def test_protocols_are_the_ones_asked_for_at_the_gamma_that_each_says() -> None:
    config = load_config("smoke")
    got = protocols(config, SCORES, LABELS, UNSEEN, 1.0)
    assert list(got) == ["validation", "none", "oracle"]
    assert got["validation"] == zero_shot_metrics(SCORES, LABELS, UNSEEN, 1.0)
    assert got["none"] == zero_shot_metrics(SCORES, LABELS, UNSEEN, 0.0)
    # H: 4/7 at 0, .48 from 0.5 on, .517 from 1 on; below 0 it is lower, as class 3's image has its step at -1
    assert got["oracle"]["H"] == pytest.approx(400 / 7)
    assert -1 <= got["oracle"]["gamma"] < 0.5
    only = load_config("smoke", ["evaluation.protocols=[oracle]"])
    assert protocols(only, SCORES, LABELS, UNSEEN, 1.0) == {"oracle": got["oracle"]}


def test_there_is_no_validation_protocol_when_training_chose_no_gamma() -> None:
    assert list(protocols(load_config("smoke"), SCORES, LABELS, UNSEEN, None)) == ["none", "oracle"]


@given(problems(), st.floats(-8, 8))
@settings(deadline=None)
def test_the_oracle_is_never_below_any_gamma(problem: tuple[np.ndarray, np.ndarray, np.ndarray], gamma: float) -> None:
    got = protocols(Config(), *problem, gamma)
    assert got["oracle"]["H"] >= max(got["validation"]["H"], got["none"]["H"]) - 1e-9


SIDE = 32
"""Pixels of an image; in patches of 8 it has 2 x 2 merged groups of 16 pixels."""
CLASSES = pd.DataFrame(
    {
        "name": ["wren", "crow", "gull", "kite", "swan", "ibis"],
        "role": ["train", "train", "val_unseen", "val_unseen", "test_unseen", "test_unseen"],
        **{name: np.random.default_rng(k).random(6) for k, name in enumerate(["red", "big", "wet", "fast"])},
    }
)
IMAGES = {"train": (0, 1), "val_seen": (0, 1), "val_unseen": (2, 3), "test_seen": (0, 1, 2), "test_unseen": (4, 5)}
"""Role of images -> classes that have some; the first one has two more than the others, kite has none to test."""


@dataclass(frozen=True)
class World:
    bundle: Bundle
    config: Config
    model: SVIP
    checkpoint: Path


def write_bundle(path: Path, test_seed: int = 1, masked: bool = True) -> Bundle:
    """Noise; ``test_seed`` decides the test images alone."""
    with BundleWriter(path) as writer:
        for role, classes in IMAGES.items():
            generator = np.random.default_rng(test_seed if role.startswith("test") else 0)
            for label in classes:
                for n in range(4 if label == classes[0] else 2):
                    image = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                    mask = np.zeros((SIDE, SIDE), np.uint8)
                    mask[:16, :16] = 1
                    writer.add(f"{role}/{label}/{n}", label, role, image, mask if masked else None)
        return writer.finish(CLASSES, {"dataset": "synthetic", "split": "standard", "fold": 1})


def make_world(folder: Path, bundle: Bundle, *overrides: str, gamma: float | None = 0.5) -> World:
    """An untrained model saved as if training had finished on the bundle."""
    tiny = ["depth=1", "embed_dim=16", "num_heads=2"]
    config = load_config(
        "smoke",
        [
            *(f"model.backbone_args.{part}" for part in tiny),
            f"data.image_size={SIDE}",
            "data.store_size=32",
            "model.selected_groups=2",
            "model.hidden=8",
            *overrides,
        ],
    )
    torch.manual_seed(0)
    model = SVIP(config.model, SIDE, torch.randn(4, 5)).eval()
    folder.mkdir(parents=True)
    info = {"attributes": 4, "gamma": gamma, "bundle_sha256": bundle.sha256, "device": "cpu", "seconds": 1.0}
    save_model(folder, model, config, info)
    (folder / "history.json").write_text("[]")
    (folder / "select").mkdir()
    save_weights(folder / "select" / "best.safetensors", model)
    return World(bundle, config, model, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder / "checkpoint", write_bundle(folder / "bundle"))


@pytest.fixture(scope="module")
def evaluated(world: World) -> tuple[dict[str, Any], Path]:
    out = world.checkpoint / "evaluation"
    return evaluate(world.checkpoint, world.bundle, out), out


def test_evaluation_counts_what_the_saved_scores_say(world: World, evaluated: tuple[dict[str, Any], Path]) -> None:
    metrics, out = evaluated
    with np.load(out / "predictions.npz") as stored:
        scores, labels = stored["scores"], stored["labels"]
        assert stored["unseen"].tolist() == [4, 5]
        images = torch.from_numpy(np.stack([world.bundle.image(row) for row in stored["rows"]])).permute(0, 3, 1, 2)
        np.testing.assert_allclose(stored["attributes"], world.model.predict(images).attributes, atol=1e-5)
    assert labels.tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [4] * 4 + [5] * 2
    assert metrics["protocols"]["validation"]["gamma"] == 0.5
    right = (scores - 0.5 * (np.arange(6) < 4)).argmax(1) == labels
    by_class = {c: 100 * right[labels == c].mean() for c in (0, 1, 2, 4, 5)}
    assert metrics["protocols"]["validation"]["S"] == pytest.approx((by_class[0] + by_class[1] + by_class[2]) / 3)
    assert metrics["protocols"]["validation"]["U"] == pytest.approx((by_class[4] + by_class[5]) / 2)
    assert metrics["chance"] == pytest.approx({"T1": 50, "U": 100 / 6, "S": 100 / 6, "H": 100 / 6})
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_the_written_tables_agree_with_the_metrics(evaluated: tuple[dict[str, Any], Path]) -> None:
    metrics, out = evaluated
    validation = metrics["protocols"]["validation"]
    table = pd.read_csv(out / "per_class.csv")
    assert table["class"].tolist() == ["wren", "crow", "gull", "swan", "ibis"]
    assert table["images"].tolist() == [4, 2, 2, 4, 2]
    by_role = table.groupby("role")[["accuracy_zsl", "accuracy_gzsl"]].mean()
    assert by_role.loc["unseen", "accuracy_zsl"] == pytest.approx(validation["T1"])
    assert by_role.loc["unseen", "accuracy_gzsl"] == pytest.approx(validation["U"])
    assert by_role.loc["seen", "accuracy_gzsl"] == pytest.approx(validation["S"])

    curve = pd.read_csv(out / "curve.csv")
    assert (np.diff(curve["gamma"]) > 0).all()
    widths, heights = np.diff(curve["unseen"]), (curve["seen"].to_numpy()[1:] + curve["seen"].to_numpy()[:-1]) / 2
    assert metrics["ausuc"] == pytest.approx((widths * heights).sum() / 100**2)
    with np.load(out / "predictions.npz") as stored:
        for gamma, seen, unseen in curve.itertuples(index=False):  # a row holds from its gamma on
            at = zero_shot_metrics(stored["scores"], stored["labels"], np.array([4, 5]), gamma)
            assert (seen, unseen) == pytest.approx((at["S"], at["U"]))


def test_the_comparator_reports_the_gamma_of_the_validation_classes(evaluated: tuple[dict[str, Any], Path]) -> None:
    comparator = evaluated[0]["comparators"]["eszsl"]
    assert list(comparator["protocols"]) == ["validation", "none", "oracle"]
    assert {name: comparator[name] for name in ("T1", "U", "S", "H", "gamma")} == comparator["protocols"]["validation"]


def test_other_test_images_change_nothing_that_was_chosen(
    tmp_path: Path, evaluated: tuple[dict[str, Any], Path]
) -> None:
    other = make_world(tmp_path / "checkpoint", write_bundle(tmp_path / "bundle", test_seed=2))
    metrics, before = evaluate(other.checkpoint, other.bundle, tmp_path / "out"), evaluated[0]
    assert metrics["protocols"]["validation"]["gamma"] == before["protocols"]["validation"]["gamma"]
    assert metrics["comparators"]["eszsl"]["gamma"] == before["comparators"]["eszsl"]["gamma"]
    assert metrics["protocols"]["oracle"]["gamma"] != before["protocols"]["oracle"]["gamma"], "they do differ"


def test_another_bundle_than_the_one_of_training_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="test it on the bundle whose training part it has seen"):
        evaluate(world.checkpoint, write_bundle(tmp_path / "bundle", test_seed=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plain_model_without_a_validated_gamma_gets_neither_comparator_nor_patches(tmp_path: Path) -> None:
    plain = make_world(
        tmp_path / "checkpoint",
        write_bundle(tmp_path / "bundle"),
        *("model.contextualize=none", "model.readout=cls", "train.select=false"),
        gamma=None,
    )
    metrics = evaluate(plain.checkpoint, plain.bundle, tmp_path / "out")
    assert list(metrics["protocols"]) == ["none", "oracle"]
    assert metrics["comparators"] == {}, "there are no validation classes left to choose its regularisers on"
    assert "patch_selection" not in metrics


def test_scores_that_tie_count_alike_in_the_metrics_and_in_the_table_of_classes(tmp_path: Path) -> None:
    # a collapsed model: all scores are zero, and at gamma = 0 a tie goes to the unseen class
    world = make_world(tmp_path / "checkpoint", write_bundle(tmp_path / "bundle"), "model.context_init=zero", gamma=0.0)
    assert world.model.patch_head is not None
    torch.nn.init.zeros_(world.model.patch_head.weight)
    torch.nn.init.zeros_(world.model.patch_head.bias)
    save_weights(world.checkpoint / "model.safetensors", world.model)
    metrics = evaluate(world.checkpoint, world.bundle, tmp_path / "out")["protocols"]["validation"]
    assert (metrics["S"], metrics["U"], metrics["T1"]) == (0, 50, 50)
    by_role = pd.read_csv(tmp_path / "out" / "per_class.csv").groupby("role")["accuracy_gzsl"].mean()
    assert (by_role["seen"], by_role["unseen"]) == (0, 50)


def test_a_report_without_an_evaluation_says_how_to_make_one(world: World, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no evaluation .* make one with `svip evaluate`"):
        report(tmp_path, world.checkpoint, world.bundle, tmp_path / "report")


def test_a_report_of_an_evaluation_of_another_checkpoint_is_refused(
    tmp_path: Path, evaluated: tuple[dict[str, Any], Path]
) -> None:
    other = make_world(tmp_path / "checkpoint", write_bundle(tmp_path / "bundle"))
    info = json.loads((other.checkpoint / "model.json").read_text())
    (other.checkpoint / "model.json").write_text(json.dumps(info | {"gamma": 0.123}))
    with pytest.raises(CheckpointError, match="is of another checkpoint than .*run `svip evaluate` on this one"):
        report(evaluated[1], other.checkpoint, other.bundle, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def predictions_of(selected: list[list[int]]) -> Predictions:
    mask = np.array(selected, bool)
    return Predictions(np.arange(len(mask)), np.zeros(len(mask), np.int64), torch.zeros(len(mask), 4), mask)


def test_selection_against_masks_counted_by_hand(world: World, tmp_path: Path) -> None:
    masks = np.zeros((4, SIDE, SIDE + 8), np.uint8)  # the centre crop takes 4 columns off either side
    masks[0, :16, 4:20] = 1  # group 0 whole,
    masks[0, :16, 20:28] = 1  # and half of group 1
    masks[1, 16:, 4:36] = 1  # groups 2 and 3
    masks[2, :, :4] = 1  # all of it is cropped away
    masks[3, :4, 4:8] = 1  # a sixteenth of group 0
    with BundleWriter(tmp_path / "bundle") as writer:
        for n, mask in enumerate(masks):
            writer.add(str(n), 0, "test_seen", np.zeros((*mask.shape, 3), np.uint8), mask)
        bundle = writer.finish(CLASSES, {})
    predictions = predictions_of([[1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
    got = selection_against_masks(world.model, world.config, bundle, predictions)
    assert got is not None
    # image 0: 256 of 384 object pixels, half of what is selected; image 1: half and half; image 3: nothing
    assert got["object_recall"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert got["object_precision"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0) / 3)
    assert got["random_recall"] == pytest.approx(50)  # two of four groups
    assert got["random_precision"] == pytest.approx(100 * (384 + 512 + 16) / 1024 / 3)


def test_selecting_at_random_reaches_what_random_says(world: World, tmp_path: Path) -> None:
    # every choice of two of the four groups, on one and the same mask
    pairs = [[int(g in (a, b)) for g in range(4)] for a in range(4) for b in range(a)]
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[5:20, 3:29] = 1
    with BundleWriter(tmp_path / "bundle") as writer:
        for n in range(len(pairs)):
            writer.add(str(n), 0, "test_seen", np.zeros((SIDE, SIDE, 3), np.uint8), mask)
        bundle = writer.finish(CLASSES, {})
    got = selection_against_masks(world.model, world.config, bundle, predictions_of(pairs))
    assert got is not None
    assert got["object_recall"] == pytest.approx(got["random_recall"])
    assert got["object_precision"] == pytest.approx(got["random_precision"])


def test_there_is_no_selection_to_judge_without_masks(world: World, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", masked=False)
    assert selection_against_masks(world.model, world.config, bundle, predictions_of([[1, 1, 0, 0]])) is None


def test_predictions_do_not_depend_on_the_batches_and_leave_the_model_as_it_was(world: World) -> None:
    rows = world.bundle.rows("test_seen", "test_unseen")
    config = load_config("smoke", [f"data.image_size={SIDE}", "evaluation.batch_size=3"])
    small = predict(world.model.train(), config, world.bundle, rows, "small batches")
    modes = [world.model.training]
    whole = predict(world.model.eval(), world.config, world.bundle, rows, "one batch")
    assert [*modes, world.model.training] == [True, False]
    torch.testing.assert_close(small.attributes, whole.attributes)
    assert small.selected.tolist() == whole.selected.tolist()
    assert (whole.selected.sum(1) == 2).all()
    assert whole.labels.tolist() == world.bundle.split["class_id"].iloc[rows].tolist()


def test_frozen_features_are_the_class_token_before_the_mean_of_the_merged_groups(world: World) -> None:
    rows = world.bundle.rows("train")[[3, 0]]
    features, labels = frozen_features(world.model, world.config, world.bundle, rows, patches=True)
    images = torch.from_numpy(np.stack([world.bundle.image(row) for row in rows])).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = world.model.backbone.vit.forward_features(world.model.normalize(images)).numpy()  # [2, 17, 16]
    grid = tokens[:, 1:].reshape(2, 2, 2, 2, 2, 16)  # image, group row, row in it, group column, column in it, channel
    groups = grid.transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 64)
    np.testing.assert_allclose(features, np.concatenate([tokens[:, 0], groups.mean(1)], axis=1), atol=1e-5)
    assert labels.tolist() == [0, 0]
    alone, _ = frozen_features(world.model, world.config, world.bundle, rows)
    np.testing.assert_allclose(alone, tokens[:, 0], atol=1e-5)
