"""Evaluation of a checkpoint on the test images, beside the comparator, and the report of what came out.

Writes metrics.json, per_class.csv, curve.csv and predictions.npz (labels, scores and selections of all test
images, and which classes are unseen), and draws charts/.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from svip.config import Config, flatten, variant
from svip.data.bundle import TRAINVAL, Bundle
from svip.data.images import square
from svip.evaluation import eszsl
from svip.evaluation.calibration import SeenUnseenCurve, answers_at, best_among, ranking
from svip.evaluation.charts import evaluation_charts
from svip.evaluation.inference import Predictions, choose_device, deciding, distinctions, frozen_features, predict
from svip.evaluation.metrics import chance, per_class_accuracy, published_metrics, zero_shot_metrics
from svip.evaluation.report import Example, markdown_table, write_report
from svip.models.svip import SVIP
from svip.training import distributed
from svip.training.checkpoint import CheckpointError, load_model, write_atomically, write_json, write_text

log = logging.getLogger(__name__)

EXAMPLES = 8
"""Test images in the report, half of them of unseen classes."""


def evaluate(checkpoint: Path, bundle: Bundle, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """All protocols that the configuration lists; returns metrics.json's content (percent).

    Several processes share the images, and rank 0 writes.
    ``overrides`` of the checkpoint's configuration: how and where it is evaluated (see ``checkpoint.read_config``).
    """
    model, config, info = load_tested(checkpoint, bundle, overrides)
    unseen = bundle.classes_with("test_unseen")
    test = predict(model, config, bundle, bundle.rows("test_seen", "test_unseen"), "test")
    scores = test.scores(model, bundle.class_attributes)
    curve = SeenUnseenCurve.of(scores, test.labels, unseen)
    metrics: dict[str, Any] = {
        "method": variant(config),
        "protocols": protocols(config, scores, test.labels, unseen, info["gamma"], info.get("published")),
        "comparators": _comparators(model, checkpoint, config, bundle),
        "chance": chance(len(bundle.classes) - len(unseen), len(unseen)),
        "counts": bundle.info["counts"],
        "ausuc": curve.area(),
    }
    selection = selection_against_masks(model, config, bundle, test)
    if selection:
        metrics["patch_selection"] = selection
    metrics["settings"] = flatten(config)
    metrics["training"] = info

    edges = np.concatenate([curve.steps[:1] - 1, curve.steps])
    points = pd.DataFrame({"gamma": edges, "seen": 100 * curve.seen, "unseen": 100 * curve.unseen})

    def save(path: Path) -> None:
        with path.open("wb") as file:  # a path would get the suffix .npz
            np.savez_compressed(
                file,
                rows=test.rows,
                labels=test.labels,
                unseen=unseen,
                scores=scores,
                selected=test.selected,
                attributes=test.attributes.numpy(),
            )

    def write() -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "per_class.csv", _per_class(bundle, scores, test.labels, unseen, info["gamma"] or 0.0))
        _write_csv(out / "curve.csv", points)
        write_atomically(out / "predictions.npz", save)
        write_text(out / "results.md", markdown_table(metrics))
        write_json(out / "metrics.json", metrics)
        evaluation_charts(out, metrics)
        return metrics

    return distributed.on_main(write)


def load_tested(checkpoint: Path, bundle: Bundle, overrides: Sequence[str] = ()) -> tuple[SVIP, Config, dict[str, Any]]:
    """``load_model``, on the device that it computes on; CheckpointError where it can't be tested on this bundle."""
    model, config, info = load_model(checkpoint, overrides=overrides)
    check_bundle(checkpoint, config, info, bundle)
    if info["bundle_sha256"] is None:
        log.warning(
            "%s is imported: whether it was trained on images that %s tests is unknown", checkpoint, bundle.path
        )
    return model.to(choose_device(config.train.device)), config, info


def check_bundle(checkpoint: Path, config: Config, info: Mapping[str, Any], bundle: Bundle) -> None:
    """CheckpointError for a bundle that a checkpoint can't be tested on.

    One imported without a bundle is of no known training part; then the data set, its split and its attributes count.
    """
    if info["bundle_sha256"] is None:
        expected = f"{config.data.dataset}, {config.data.split} split, {info['attributes']} attributes"
        found = f"{bundle.info['dataset']}, {bundle.info['split']} split, {len(bundle.attribute_names)} attributes"
        if found != expected:
            raise CheckpointError(f"{checkpoint} is for {expected}, and {bundle.path} is {found}: test it on such data")
    elif info["bundle_sha256"] != bundle.sha256:
        raise CheckpointError(
            f"{checkpoint} was trained on bundle {info['bundle_sha256'][:12]}, and {bundle.path} is "
            f"{bundle.sha256[:12]}: test it on the bundle whose training part it has seen"
        )


def protocols(
    config: Config,
    scores: NDArray[np.floating],
    labels: NDArray[np.int64],
    unseen: NDArray[np.int64],
    gamma: float | None,
    published: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Protocol -> T1, U, S, H (percent) and gamma.

    ``validation`` needs the ``gamma`` that training chose. ``published`` is what training noted of its best epoch on
    the test set; without it (no such training) it is of these scores alone.
    """
    gammas = {"none": 0.0, "oracle": SeenUnseenCurve.of(scores, labels, unseen).best_gamma()}
    if gamma is not None:
        gammas["validation"] = gamma
    results = {name: zero_shot_metrics(scores, labels, unseen, value) for name, value in gammas.items()}
    results["published"] = dict(published or published_metrics(scores, labels, unseen))
    return {name: results[name] for name in config.evaluation.protocols if name in results}


def _comparators(model: SVIP, checkpoint: Path, config: Config, bundle: Bundle) -> dict[str, Any]:
    """ESZSL on frozen class tokens: of the pretrained backbone, or of the trained one where nothing was pretrained.

    In the second case the validation choice uses the backbone of the select phase, which never saw those classes.
    A comparator's own T1, U, S, H are those at the gamma of the validation classes; ``protocols`` has them all.
    """
    if not config.evaluation.eszsl or not config.train.select:
        return {}
    device = next(model.parameters()).device
    if config.model.weights == "none":
        chooser, _, _ = load_model(checkpoint, "select/best.safetensors")
        tester = model
    else:
        words = torch.zeros(len(bundle.attribute_names), 1)
        chooser = tester = SVIP(config.model, config.data.image_size, words)
    chooser, tester = chooser.to(device).eval(), tester.eval()

    classes = bundle.classes_with("train", "val_unseen")
    train, train_labels = frozen_features(chooser, config, bundle, bundle.rows("train"))
    held_out, held_out_labels = frozen_features(chooser, config, bundle, bundle.rows("val_seen", "val_unseen"))
    train_classes = bundle.classes_with("train")
    center_of_train = train.mean(0)
    fitted = eszsl.ESZSL(
        train - center_of_train, np.searchsorted(train_classes, train_labels), bundle.class_attributes[train_classes]
    )
    chosen = eszsl.choose_regularizers(
        fitted,
        held_out - center_of_train,
        np.searchsorted(classes, held_out_labels),
        bundle.class_attributes[classes],
        np.searchsorted(classes, bundle.classes_with("val_unseen")),
    )
    if tester is chooser:
        features, labels = np.concatenate([train, held_out]), np.concatenate([train_labels, held_out_labels])
    else:
        features, labels = frozen_features(tester, config, bundle, bundle.rows(*TRAINVAL))
    test, test_labels = frozen_features(tester, config, bundle, bundle.rows("test_seen", "test_unseen"))
    mean = features.mean(0)
    final = eszsl.ESZSL(features - mean, np.searchsorted(classes, labels), bundle.class_attributes[classes])
    weights = final.weights(chosen.features, chosen.attributes)
    scores = eszsl.scores(test - mean, weights, bundle.class_attributes)
    unseen = bundle.classes_with("test_unseen")
    honest = zero_shot_metrics(scores, test_labels, unseen, chosen.gamma)
    by_protocol = protocols(config, scores, test_labels, unseen, chosen.gamma)
    by_protocol.pop("published", None)  # its offsets are for the softmax of logits, and these scores are none
    return {"eszsl": {**honest, "protocols": by_protocol}}


def selection_against_masks(
    model: SVIP, config: Config, bundle: Bundle, predictions: Predictions
) -> dict[str, float] | None:
    """How well the selected groups cover the objects, where the bundle knows their masks (percent).

    object_recall: share of the object's pixels within selected groups; object_precision: share of the selected
    pixels that are object; random_*: what as many groups drawn at random reach in expectation.
    """
    if not model.selects or bundle.mask(int(predictions.rows[0])) is None:
        return None
    height, width = model.group_grid
    recall, precision, cover = [], [], []
    for row, selected in zip(predictions.rows, predictions.selected, strict=True):
        object_share = _group_means(_mask_view(config, bundle, int(row)), height, width)  # [G]
        if object_share.sum() == 0:
            continue
        recall.append(object_share[selected].sum() / object_share.sum())
        precision.append(object_share[selected].mean())
        cover.append(object_share.mean())
    return {
        "object_recall": 100 * float(np.mean(recall)),
        "random_recall": 100 * config.model.selected_groups / model.groups,
        "object_precision": 100 * float(np.mean(precision)),
        "random_precision": 100 * float(np.mean(cover)),
    }


def report(
    evaluation: Path, checkpoint: Path, bundle: Bundle, out: Path, lineage: Mapping[str, str] | None = None
) -> Path:
    """Write report.html and results.md to ``out`` from what training and evaluation left; the page's path.

    CheckpointError where the three are not of one training.
    """
    if not (evaluation / "metrics.json").is_file():
        raise FileNotFoundError(f"{evaluation} holds no evaluation (no metrics.json); make one with `svip evaluate`")
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    model, config, info = load_model(checkpoint)
    check_bundle(checkpoint, config, info, bundle)
    if metrics.get("training") != info:
        raise CheckpointError(
            f"{evaluation} is of another checkpoint than {checkpoint}; run `svip evaluate` on this one"
        )
    facts = {"dataset": config.data.dataset, "bundle sha256": bundle.sha256}
    if "imported" in info:
        facts["imported from"] = info["imported"]["file"]
    else:
        minutes = f"{info['seconds'] / 60:.1f}"
        facts |= {"seed": str(config.train.seed), "device": str(info["device"]), "minutes": minutes}
    facts |= lineage or {}
    return write_report(
        out,
        metrics=metrics,
        history=json.loads((checkpoint / "history.json").read_text(encoding="utf-8")),
        per_class=pd.read_csv(evaluation / "per_class.csv"),
        curve=pd.read_csv(evaluation / "curve.csv"),
        examples=_examples(model, config, bundle, evaluation, info["gamma"] or 0.0),
        lineage=facts,
    )


def _examples(model: SVIP, config: Config, bundle: Bundle, evaluation: Path, gamma: float) -> list[Example]:
    """Test images, seen and unseen in turn, spread evenly over the classes."""
    with np.load(evaluation / "predictions.npz", allow_pickle=False) as stored:
        rows, labels, scores, selected, attributes = (
            stored[name] for name in ("rows", "labels", "scores", "selected", "attributes")
        )
    is_seen = ~np.isin(np.arange(scores.shape[1]), bundle.classes_with("test_unseen"))
    calibrated = scores - gamma * is_seen
    halves = [np.flatnonzero(is_seen[labels] == seen) for seen in (False, True)]
    chosen = np.concatenate([half[np.linspace(0, len(half) - 1, EXAMPLES // 2).astype(int)] for half in halves])
    distinctive = distinctions(bundle.class_attributes, bundle.class_attributes)
    examples = []
    for k in chosen:
        row = int(rows[k])
        best = ranking(calibrated[k], is_seen)[:3]
        decided = deciding(attributes[k], distinctive[best[0]], 3)
        examples.append(
            Example(
                image=_view(config, bundle.image(row)),
                name=bundle.class_names[labels[k]],
                role="seen" if is_seen[labels[k]] else "unseen",
                selected=selected[k].reshape(model.group_grid),
                predictions=[(bundle.class_names[c], float(calibrated[k, c]), bool(c == labels[k])) for c in best],
                mask=None if bundle.mask(row) is None else _mask_view(config, bundle, row),
                attributes=[(bundle.attribute_names[a], float(attributes[k, a])) for a in decided],
            )
        )
    return examples


def _per_class(
    bundle: Bundle, scores: NDArray[np.floating], labels: NDArray[np.int64], unseen: NDArray[np.int64], gamma: float
) -> pd.DataFrame:
    """One row a class: accuracy (percent) among the classes of its own kind, and among all at ``gamma``."""
    classes = len(bundle.classes)
    is_unseen = np.isin(np.arange(classes), unseen)
    own = np.where(is_unseen[labels], best_among(scores, is_unseen)[0], best_among(scores, ~is_unseen)[0])
    among_all = answers_at(gamma, scores, is_unseen)
    table = pd.DataFrame(
        {
            "class": bundle.class_names,
            "role": np.where(is_unseen, "unseen", "seen"),
            "images": np.bincount(labels, minlength=classes),
            "accuracy_zsl": 100 * per_class_accuracy(own, labels, classes),
            "accuracy_gzsl": 100 * per_class_accuracy(among_all, labels, classes),
        }
    )
    return table[table["images"] > 0]


def _view(config: Config, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The test view of a stored image, uint8 [S, S, 3]."""
    return square(image, config.data.image_size, config.data.test_view)


def _mask_view(config: Config, bundle: Bundle, row: int) -> NDArray[np.uint8]:
    """The object mask under the test view, 0 or 1, [S, S]."""
    mask = bundle.mask(row)
    assert mask is not None
    return (_view(config, np.repeat(255 * mask[:, :, None], 3, axis=2))[:, :, 0] > 127).astype(np.uint8)


def _group_means(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """Mean of a mask [S, S] within each cell of a height x width grid, row by row: [G]."""
    side = mask.shape[0]
    cells = mask[: side // height * height, : side // width * width]
    return cells.reshape(height, side // height, width, side // width).mean((1, 3)).flatten()


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))
