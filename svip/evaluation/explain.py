"""What a model sees in test images: attention by layer, attribute localization, the patch classifier's features.

Shapes as in ``svip.models.svip``; the G merged groups lie on a grid of h x w, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svip.config import Config
from svip.data.bundle import Bundle
from svip.data.images import ImageDataset
from svip.models.patches import class_attention, group_scores, merge
from svip.models.svip import SVIP

SEED = 0
"""Seed of everything that is drawn for a figure."""


@dataclass(frozen=True)
class Explanation:
    """What a model reads off n images, in the pass of test time."""

    images: NDArray[np.uint8]
    """The views that the model saw, [n, S, S, 3]."""
    attributes: NDArray[np.float32]
    """a_hat, [n, A]."""
    selected: NDArray[np.bool_]
    """Selected groups, [n, h, w]; all true for a model that selects none."""
    maps: NDArray[np.float32]
    """Each group's attribute values, [n, h, w, A]; NaN where the group was dropped."""


class LayerAttention:
    """A hook of ``Backbone.encode`` that keeps the class token's attention of each layer, mean over heads: [B, T]."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.rows.append(class_attention(query, key, scale))


def views(config: Config, bundle: Bundle, rows: NDArray[np.int64]) -> Tensor:
    """The test views of those images, uint8 [n, 3, S, S]."""
    dataset = ImageDataset(bundle, rows, config.data, train=False, seed=0)
    return torch.stack([dataset[0, position][0] for position in range(len(rows))])


@torch.no_grad()
def attention_by_layer(model: SVIP, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pass 1's class token attention to the groups in each layer [n, L, G], and the model's aggregate of all [n, G].

    A group's attention is the mean of its four tokens'; its aggregate is what the patch classifier learns from.
    """
    layers, scores = LayerAttention(), model.attention_scores()

    def hook(query: Tensor, key: Tensor, scale: float) -> None:
        layers(query, key, scale)
        scores(query, key, scale)

    model.backbone.encode(model.backbone.embed(model.normalize(images)), hook=hook)
    tokens = torch.stack(layers.rows, 1)[:, :, model.backbone.prefix :]  # [n, L, N]
    aggregate = group_scores(scores, model.backbone.prefix, model.score_index)
    return tokens[:, :, model.index].mean(-1).cpu().numpy(), aggregate.cpu().numpy()


@torch.no_grad()
def explain(model: SVIP, images: Tensor) -> Explanation:
    """Predictions with the map of each attribute: P2A's output before pooling (Eq. 10).

    A model that reads only the class token has no such output; its map is its class head applied to each final patch
    token, mean over the tokens of a group.
    """
    prediction = model.predict(images)
    selected, values = prediction.selected, prediction.localization
    if values is None:
        values = _class_head_values(model, images, selected)
    there = torch.ones_like(selected) if values.shape[1] == model.groups else selected
    maps = values.new_full((*selected.shape, values.shape[-1]), float("nan"), dtype=torch.float32)
    maps[there] = values.float().flatten(0, 1)
    return Explanation(
        images.permute(0, 2, 3, 1).cpu().numpy(),
        prediction.attributes.cpu().numpy(),
        selected.unflatten(1, model.group_grid).cpu().numpy(),
        maps.unflatten(1, model.group_grid).cpu().numpy(),
    )


@torch.no_grad()
def hidden_features(model: SVIP, images: Tensor) -> NDArray[np.float32]:
    """The patch classifier's hidden layer after its ReLU (Eq. 5), [n, G, hidden]; ValueError without a classifier."""
    if model.patch_classifier is None:
        raise ValueError("this model selects no patches: it has no patch classifier to look into")
    groups = merge(model.backbone.embed(model.normalize(images)), model.index)
    features: NDArray[np.float32] = model.patch_classifier[:2](groups).float().cpu().numpy()
    return features


def in_plane(vectors: NDArray[np.float32], metric: str = "euclidean") -> NDArray[np.float32]:
    """t-SNE of n >= 2 vectors [n, F] with a fixed seed: [n, 2]."""
    from sklearn.manifold import TSNE  # takes a second, which only figures need

    perplexity = max(1.0, min(30.0, (len(vectors) - 1) / 3))
    plane = TSNE(init="random", metric=metric, perplexity=perplexity, random_state=SEED).fit_transform(vectors)
    return np.asarray(plane, np.float32)


def separation(vectors: NDArray[np.float32], labels: NDArray[Any], metric: str = "euclidean") -> float:
    """Silhouette score of labelled vectors [n, F], from -1 to 1; 0 where classes overlap, 1 where each is a point."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(vectors, labels, metric=metric))


def _class_head_values(model: SVIP, images: Tensor, selected: Tensor) -> Tensor:
    """The class head on the final patch tokens, mean of each group that is left: [B, G, A] (or [B, M, A])."""
    assert model.class_head is not None
    patches = model.backbone.embed(model.normalize(images))
    groups = model.final_groups(model.encode_contextualized(patches, selected)[0])
    values: Tensor = model.class_head(groups.unflatten(2, (4, -1))).mean(2)
    return values
