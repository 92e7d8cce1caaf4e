"""The paper's figures 3, 5, 6 and 7 for a trained checkpoint, as PNG files with captions and a page that shows them."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from svip.config import Config, variant
from svip.data.bundle import Bundle
from svip.evaluation import explain, paper_figures
from svip.evaluation.evaluate import load_tested
from svip.evaluation.inference import autocast, choose_device, deciding, distinctions, predict
from svip.evaluation.pages import render
from svip.evaluation.report import method_name
from svip.models.svip import SVIP
from svip.training.checkpoint import write_atomically, write_text

ATTRIBUTES = 3
"""Attributes localized in each image of Fig. 5."""
SAMPLE = 32
"""Most images whose attention Fig. 3 averages, and whose groups Fig. 6 shows."""
CLASSES, IMAGES_A_CLASS = 20, 60
"""Most unseen classes of Fig. 7, and most images of each."""
Rows = NDArray[np.int64]

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
    """A checkpoint's model, on the device that it computes on."""

    model: SVIP
    config: Config

    @property
    def name(self) -> str:
        return method_name({"method": variant(self.config)})

    def views(self, bundle: Bundle, rows: Rows) -> torch.Tensor:
        return explain.views(self.config, bundle, rows).to(choose_device(self.config.train.device))


def draw_figures(
    checkpoint: Path, bundle: Bundle, out: Path, baseline: Path | None = None, count: int = 3
) -> list[Path]:
    """Write the figures that the model can have, and figures.html, to ``out``; the paths of all files.

    ``baseline``: a checkpoint to stand beside it in figures 5 and 7. ``count``: images of figures 5 and 6 (a).
    All images are of unseen classes. CheckpointError where a checkpoint was trained on another bundle.
    """
    models = [Trained(*load_tested(path, bundle)[:2]) for path in (baseline, checkpoint) if path is not None]
    svip = models[-1]
    sample = _spread(bundle.rows("test_unseen"), SAMPLE)
    shown = _spread(np.arange(len(sample)), count)
    with autocast(svip.config, choose_device(svip.config.train.device)):
        figures = [
            *_attention(svip, bundle, sample),
            *_localization(models, bundle, sample[shown]),
            *_patches(svip, bundle, sample, shown),
            *_attributes(models, bundle),
        ]
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{item.name}.png" for item in figures]
    for item, file in zip(figures, files, strict=True):
        write_atomically(file, partial(item.figure.savefig, format="png", dpi=150))
    write_text(out / "figures.html", _page(svip, bundle, figures, files))
    return [*files, out / "figures.html"]


def _attention(svip: Trained, bundle: Bundle, rows: Rows) -> Iterator[Captioned]:
    layers, scores = explain.attention_by_layer(svip.model, svip.views(bundle, rows))
    score = "Eq. 4" if svip.config.model.score == "eq4" else "rollout"
    yield Captioned(
        "attention",
        "Figure 3. Attention of the merged groups over the layers",
        f"How much the class token of {svip.name} attends to each of the {svip.model.groups} merged groups in each "
        f"layer, mean over heads and over {len(rows)} test images of unseen classes; below, the score ({score}), which "
        "aggregates all layers. Dark is high; each row is scaled from its lowest to its highest group, and thin lines "
        "part the rows of the image. r: correlation of a layer with the score over the groups of an image, mean over "
        "the images; the further it is from 1, the less that layer alone would choose the same patches.",
        paper_figures.attention_heatmap(layers, scores, svip.model.group_grid[1], score),
    )


def _localization(models: list[Trained], bundle: Bundle, rows: Rows) -> Iterator[Captioned]:
    seen = [explain.explain(trained.model, trained.views(bundle, rows)) for trained in models]
    labels = bundle.split["class_id"].to_numpy()[rows]
    distinctive = distinctions(bundle.class_attributes, bundle.class_attributes)[labels]
    # what is not there has no place: only attributes that the class has and others lack
    decided = deciding(seen[-1].attributes, np.maximum(distinctive, 0), ATTRIBUTES)
    images = [(bundle.class_names[label], image) for label, image in zip(labels, seen[-1].images, strict=True)]
    panels = [
        [
            (
                bundle.attribute_names[attribute],
                [
                    paper_figures.LocalizationPanel(
                        trained.name, one.images[k], one.maps[k, :, :, attribute], one.selected[k]
                    )
                    for trained, one in zip(models, seen, strict=True)
                ],
            )
            for attribute in attributes
        ]
        for k, attributes in enumerate(decided)
    ]
    yield Captioned(
        "localization",
        "Figure 5. Where each attribute is read",
        f"Test images of unseen classes, and the {ATTRIBUTES} attributes that speak most for their true class. Orange "
        "is high, scaled within each map over the groups without stripes; the frame marks the highest of them. Striped "
        f"groups are semantic-unrelated. {' '.join(map(_map_source, models))}",
        paper_figures.localization_grid(images, panels),
    )


def _patches(svip: Trained, bundle: Bundle, rows: Rows, shown: Rows) -> Iterator[Captioned]:
    if svip.model.patch_classifier is None or svip.config.model.selected_groups == svip.model.groups:
        log.info("figure 6 is left out: %s leaves out no patches", svip.name)
        return
    images = svip.views(bundle, rows)
    seen = explain.explain(svip.model, images)
    selected = seen.selected.flatten()
    features = explain.hidden_features(svip.model, images).reshape(len(selected), -1)
    yield Captioned(
        "patches",
        "Figure 6. Selected and semantic-unrelated patches",
        "(a) Test images of unseen classes; the patch classifier left out the striped groups, and kept "
        f"{svip.config.model.selected_groups} of {svip.model.groups}. (b) t-SNE of the classifier's hidden features "
        f"(after ReLU) of all groups of {len(rows)} test images; circles are selected groups, crosses unrelated ones. "
        "Silhouette score of the two in the features themselves: "
        f"{explain.separation(features, selected):.2f} (1: two points, 0: one cloud).",
        paper_figures.patch_selection(seen.images[shown], seen.selected[shown], explain.in_plane(features), selected),
    )


def _attributes(models: list[Trained], bundle: Bundle) -> Iterator[Captioned]:
    everything, class_ids = bundle.rows("test_unseen"), bundle.split["class_id"].to_numpy()
    classes = np.unique(class_ids[everything])
    if len(classes) > CLASSES:
        classes = np.sort(np.random.default_rng(explain.SEED).choice(classes, CLASSES, replace=False))
    rows = np.concatenate([_spread(everything[class_ids[everything] == label], IMAGES_A_CLASS) for label in classes])
    if not 1 < len(classes) < len(rows):
        log.info("figure 7 is left out: it needs two unseen classes, and more than one image of a class")
        return
    labels = np.searchsorted(classes, class_ids[rows])
    panels = []
    for trained in models:
        vectors = predict(trained.model, trained.config, bundle, rows, "attributes").attributes.numpy()
        silhouette = explain.separation(vectors, labels, "cosine")
        panels.append((trained.name, explain.in_plane(vectors, "cosine"), silhouette))
    yield Captioned(
        "attributes",
        "Figure 7. Predicted attributes of unseen classes",
        f"t-SNE (cosine distance, as in Eq. 11) of the attributes predicted for {len(rows)} test images of "
        f"{len(classes)} unseen classes; a color and marker a class. The silhouette score is that of the predicted "
        "vectors themselves, not of the picture: 1 where each class is a point, 0 where they overlap.",
        paper_figures.attribute_clusters(panels, labels, [bundle.class_names[label] for label in classes]),
    )


def _spread(rows: Rows, count: int) -> Rows:
    """At most ``count`` of the rows, evenly spread: a bundle lists its images by class."""
    return rows if len(rows) <= count else rows[((np.arange(count) + 0.5) * len(rows) / count).astype(int)]


def _map_source(trained: Trained) -> str:
    if trained.model.patch_head is not None:
        return f"{trained.name}: the output of P2A before pooling."
    return f"{trained.name} reads only the class token: its map is its class head on each patch token, mean of a group."


def _page(svip: Trained, bundle: Bundle, figures: list[Captioned], files: list[Path]) -> str:
    encoded = [base64.b64encode(path.read_bytes()).decode("ascii") for path in files]
    shown = zip(figures, encoded, strict=True)
    return render("figures", method=svip.name, dataset=bundle.info["dataset"], figures=shown)
