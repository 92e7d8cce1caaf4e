"""Start the attribute read-out from a closed-form probe instead of at random (``model.head_init: probe``).

A pretrained backbone's features already tell much about attributes; from a random read-out the first gradients would
mostly disturb them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from svip.config import Config
from svip.data.bundle import Bundle
from svip.evaluation.eszsl import ESZSL
from svip.evaluation.inference import frozen_features
from svip.models.svip import SVIP

FEATURES, ATTRIBUTES = 1.0, 1.0
"""Regularisers of the probe, as multiples of the mean eigenvalue; the training that follows forgets them."""


def probe_heads(
    model: SVIP, config: Config, bundle: Bundle, rows: NDArray[np.int64], classes: NDArray[np.int64]
) -> None:
    """Set the heads to ESZSL's solution on the frozen features of the training images of those classes."""
    patches = model.patch_head is not None
    features, labels = frozen_features(model, config, bundle, rows, patches)
    width = model.backbone.width
    if model.class_head is None:
        features = features[:, width:]
    mean = features.mean(0)
    matrix = bundle.class_attributes[classes]
    cosine = config.model.logits == "cosine"
    if not cosine:  # the logits are products with normalised class attributes, so it has to be fitted to those
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    probe = ESZSL(features - mean, np.searchsorted(classes, labels), matrix)
    weights = torch.from_numpy(probe.weights(FEATURES, ATTRIBUTES)).float()  # [features, A]
    if cosine:  # cosines don't see its scale, but Adam's steps do: give it that of a fresh linear layer
        weights *= (3 * width) ** -0.5 / weights.square().mean().sqrt()
    bias = -torch.from_numpy(mean).float() @ weights
    with torch.no_grad():
        for head, part in zip(
            (head for head in (model.class_head, model.patch_head) if head is not None),
            weights.split([width, len(weights) - width]) if model.class_head is not None else [weights],
            strict=False,
        ):
            head.weight.copy_(part.T)
            head.bias.zero_()
        last = model.class_head if model.class_head is not None else model.patch_head
        assert last is not None
        last.bias.copy_(bias)
