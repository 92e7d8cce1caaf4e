"""The paper's figures 3, 5, 6 and 7 for a trained checkpoint, as PNG files with captions and a page that shows them."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svip.config import Config, variant
from svip.data.bundle import Bundle
from svip.evaluation import paper_figures
from svip.evaluation.evaluate import load_tested
from svip.evaluation.explain import (
    SEED,
    Explanation,
    attention_by_layer,
    explain,
    hidden_features,
    in_plane,
    separation,
    views,
)
from svip.evaluation.figures import PALETTE
from svip.evaluation.inference import autocast, choose_device, predict
from svip.evaluation.report import method_name
from svip.models.svip import SVIP
from svip.training.checkpoint import write_atomically, write_text

ATTRIBUTES = 3
"""Attributes localized in each image of Fig. 5."""
SAMPLE = 32
"""Images whose attention Fig. 3 averages, and whose groups Fig. 6 shows."""
CLASSES = 20
"""Most unseen classes of Fig. 7."""
IMAGES_A_CLASS = 60
"""Most images of each of them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """A figure of the paper; its PNG is called ``name``."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Trained:
    """A checkpoint on the device it computes on."""

    model: SVIP
    config: Config

    @property
    def name(self) -> str:
        return method_name({"method": variant(self.config)})

    def views(self, bundle: Bundle, rows: NDArray[np.int64]) -> torch.Tensor:
        return views(self.config, bundle, rows).to(choose_device(self.config.train.device))


def draw_figures(
    checkpoint: Path, bundle: Bundle, out: Path, baseline: Path | None = None, count: int = 3
) -> list[Path]:
    """Write the figures that the model can have, and figures.html, to ``out``; the paths of all files.

    ``baseline``: a checkpoint to stand beside it in figures 5 and 7. ``count``: images of figures 5 and 6 (a).
    All images are of unseen classes. CheckpointError where a checkpoint was trained on another bundle.
    """
    models = [_load(path, bundle) for path in (baseline, checkpoint) if path is not None]
    svip = models[-1]
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(svip.config.train.device)
    figures, files = [], []
    with autocast(svip.config, device):
        for make in (_attention, _localization, _patches, _attributes):
            figures += list(make(models, bundle, count))
    for item in figures:
        path = out / f"{item.name}.png"
        write_atomically(path, partial(item.figure.savefig, format="png", dpi=150))
        files.append(path)
    write_text(out / "figures.html", _page(svip, bundle, figures, files))
    return [*files, out / "figures.html"]


def _attention(models: list[Trained], bundle: Bundle, count: int) -> Iterator[Captioned]:
    svip = models[-1]
    rows = _spread(bundle.rows("test_unseen"), SAMPLE)
    layers, scores = attention_by_layer(svip.model, svip.views(bundle, rows))
    yield Captioned(
        "attention",
        "Figure 3. Attention of the merged groups over the layers",
        f"How much the class token of {svip.name} attends to each of the {svip.model.groups} merged groups in each "
        f"layer, mean over heads and over {len(rows)} test images of unseen classes; below, the score of Eq. 4, which "
        "aggregates all layers. Dark is high; each row is scaled from its lowest to its highest group, and thin lines "
        "part the rows of the image. r: correlation of a layer with Eq. 4 over the groups of an image, mean over the "
        "images; the further it is from 1, the less that layer alone would choose the same patches.",
        paper_figures.attention_heatmap(layers, scores, svip.model.backbone.grid[1] // 2),
    )


def _localization(models: list[Trained], bundle: Bundle, count: int) -> Iterator[Captioned]:
    rows = _spread(bundle.rows("test_unseen"), count)
    seen = [explain(trained.model, trained.views(bundle, rows)) for trained in models]
    labels = bundle.split["class_id"].to_numpy()[rows]
    shown = _deciding(seen[-1].attributes, bundle.class_attributes, labels)
    panels = [
        [
            (
                bundle.attribute_names[attribute],
                [_panel(trained, explained, k, attribute) for trained, explained in zip(models, seen, strict=True)],
            )
            for attribute in shown[k]
        ]
        for k in range(len(rows))
    ]
    maps = [f"{trained.name}: {_map_source(trained)}." for trained in models]
    yield Captioned(
        "localization",
        "Figure 5. Where each attribute is read",
        f"Test images of unseen classes, and the {ATTRIBUTES} attributes that speak most for their true class. Orange "
        "is high, scaled within each map over the groups that are read; the frame marks the highest of them. Striped "
        f"groups are semantic-unrelated and not read. {' '.join(maps)}",
        paper_figures.localization_grid(
            [(bundle.class_names[label], image) for label, image in zip(labels, seen[-1].images, strict=True)], panels
        ),
    )


def _patches(models: list[Trained], bundle: Bundle, count: int) -> Iterator[Captioned]:
    svip = models[-1]
    if svip.model.patch_classifier is None:
        log.info("figure 6 is left out: %s selects no patches and has no patch classifier", svip.name)
        return
    everything = bundle.rows("test_unseen")
    few = explain(svip.model, svip.views(bundle, _spread(everything, count)))
    rows = _spread(everything, SAMPLE)
    images = svip.views(bundle, rows)
    features = hidden_features(svip.model, images)
    selected = explain(svip.model, images).selected.reshape(-1)
    features = features.reshape(len(selected), -1)
    if not 0 < selected.sum() < len(selected):
        log.info("figure 6 is left out: %s selects every group", svip.name)
        return
    yield Captioned(
        "patches",
        "Figure 6. Selected and semantic-unrelated patches",
        f"(a) Test images of unseen classes; the patch classifier left out the striped groups, and kept "
        f"{svip.config.model.selected_groups} of {svip.model.groups}. (b) t-SNE of the classifier's hidden features "
        f"(after ReLU) of all groups of {len(rows)} test images; circles are selected groups, crosses unrelated ones. "
        f"Silhouette score of the two in the features themselves: {separation(features, selected):.2f} (1: two "
        "points, 0: one cloud).",
        paper_figures.patch_selection(few.images, few.selected, in_plane(features), selected),
    )


def _attributes(models: list[Trained], bundle: Bundle, count: int) -> Iterator[Captioned]:
    rows, classes = _rows_of_classes(bundle)
    labels = np.searchsorted(classes, bundle.split["class_id"].to_numpy()[rows])
    if not 1 < len(classes) < len(rows):
        log.info("figure 7 is left out: it needs two unseen classes and more than one image in a class")
        return
    panels = []
    for trained in models:
        vectors = predict(trained.model, trained.config, bundle, rows, "attributes").attributes.numpy()
        silhouette = separation(vectors, labels, "cosine")
        panels.append((trained.name, in_plane(vectors, "cosine"), silhouette))
    yield Captioned(
        "attributes",
        "Figure 7. Predicted attributes of unseen classes",
        f"t-SNE (cosine distance, as in Eq. 11) of the attributes predicted for {len(rows)} test images of "
        f"{len(classes)} unseen classes, drawn at random; a colour and marker a class. The silhouette score is that of "
        "the predicted vectors themselves, not of the picture: 1 where each class is a point, 0 where they overlap.",
        paper_figures.attribute_clusters(panels, labels, [bundle.class_names[label] for label in classes]),
    )


def _load(checkpoint: Path, bundle: Bundle) -> Trained:
    model, config, _ = load_tested(checkpoint, bundle)
    return Trained(model, config)


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most ``count`` of the rows, evenly spread: a bundle lists its images by class."""
    return rows if len(rows) <= count else rows[((np.arange(count) + 0.5) * len(rows) / count).astype(int)]


def _rows_of_classes(bundle: Bundle) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the test images of some unseen classes, and the classes' ids, ascending."""
    rows = bundle.rows("test_unseen")
    labels = bundle.split["class_id"].to_numpy()[rows]
    classes = np.unique(labels)
    if len(classes) > CLASSES:
        classes = np.sort(np.random.default_rng(SEED).choice(classes, CLASSES, replace=False))
    return np.concatenate([_spread(rows[labels == label], IMAGES_A_CLASS) for label in classes]), classes


def _deciding(
    predicted: NDArray[np.float32], class_attributes: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each image the attributes that speak most for its class: shown by it, and rarer in other classes. [n, 3]"""
    above = np.maximum(class_attributes[labels] - class_attributes.mean(0), 0)
    order: NDArray[np.int64] = np.argsort(-predicted * above, axis=1, kind="stable")[:, :ATTRIBUTES]
    return order


def _panel(trained: Trained, seen: Explanation, k: int, attribute: int) -> paper_figures.LocalizationPanel:
    return paper_figures.LocalizationPanel(
        trained.name, seen.images[k], seen.maps[k, :, :, attribute], seen.selected[k]
    )


def _map_source(trained: Trained) -> str:
    if trained.model.patch_head is not None:
        return "the output of P2A before pooling"
    return "it reads only the class token, so its map is its class head on each final patch token, mean of a group"


def _page(svip: Trained, bundle: Bundle, figures: list[Captioned], files: list[Path]) -> str:
    template = resources.files("svip.evaluation").joinpath("figures.html").read_text("utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    encoded = [base64.b64encode(path.read_bytes()).decode("ascii") for path in files]
    return page.from_string(template).render(
        palette=PALETTE, method=svip.name, dataset=bundle.info["dataset"], figures=zip(figures, encoded, strict=True)
    )
