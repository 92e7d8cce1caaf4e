"""The ``published`` preset against what the authors' published code returned for seeded weights and images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from svip.config import Config, load_config
from svip.models.patches import AttentionRollout, AttentionScores
from svip.models.svip import SVIP
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

Array = NDArray[Any]
GROUPS = [torch.arange(0, 9), torch.arange(9, 24), torch.arange(24, 312)]
"""The attribute groups of the stored run."""
OVERRIDES = (
    "model.backbone=vit_base_patch16_224",
    "model.backbone_args={depth: 2}",
    "model.weights=none",
    "optim.head_lr=3e-5",  # the stored trajectory has one rate
)


@dataclass(frozen=True)
class Published:
    """A ViT-B of depth 2 with the stored run's weights, its batch, and what the published code made of it."""

    config: Config
    model: SVIP
    images: Tensor
    targets: Tensor
    seen: Tensor
    outputs: dict[str, Array]

    def step(self, optimizer: torch.optim.AdamW) -> dict[str, float]:
        return train_step(self.model, optimizer, self.config, self.images, self.targets, self.seen, GROUPS)


@pytest.fixture
def published(shared: Path) -> Published:
    path = shared / "golden" / "published_code_cub.npz"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    random = np.random.default_rng(11)
    words = torch.from_numpy(random.standard_normal((312, 300)).astype(np.float32))
    noise = torch.from_numpy(random.standard_normal((3, 3, 224, 224)).astype(np.float32))
    attributes = torch.from_numpy(random.random((150, 312)).astype(np.float32))
    config = load_config("published/cub", OVERRIDES)
    model = SVIP(config.model, 224, words).eval()
    # the stored images are normalised ones
    model.mean, model.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(published_weights(name, tuple(parameter.shape))))
    return Published(
        config,
        model,
        F.avg_pool2d(noise, 9, 1, 4) * 4 + torch.linspace(-1, 1, 224)[None, None, :, None],
        torch.from_numpy(random.integers(0, 150, 3)),
        attributes / (attributes.norm(dim=1, keepdim=True) + 1e-5),
        {name: values for name, values in np.load(path).items() if name != "spec"},
    )


def published_name(name: str) -> str:
    """What the published code calls a parameter of ours."""
    for ours, theirs in {
        "backbone.vit.": "",
        "patch_classifier.": "token_cls.",
        "context.to_width.": "v2p.",
        "context.to_tokens.": "p2t.",
        "patch_head.": "head_1.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def published_weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The stored run's values of a parameter: they are seeded by its name in the published code."""
    name = published_name(name)
    values = np.random.default_rng([11, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return (1 + 0.1 * values).astype(np.float32)
    return (values * (0.04 if len(shape) > 1 else 0.02)).astype(np.float32)


@pytest.mark.shared
@torch.no_grad()
def test_training_outputs_agree_with_the_published_code(published: Published) -> None:
    passes, outputs = published.model(published.images), published.outputs
    np.testing.assert_allclose(passes.source, outputs["source_attributes"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(passes.contextualized, outputs["contextualized_attributes"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(passes.patch_logits.sigmoid(), outputs["patch_scores"], rtol=1e-5)
    np.testing.assert_array_equal(passes.patch_targets, outputs["patch_labels"])


@pytest.mark.shared
@torch.no_grad()
def test_both_scores_agree_with_the_published_code(published: Published) -> None:
    eq4, rollout = AttentionScores(), AttentionRollout()
    patches = published.model.backbone.embed(published.images)
    published.model.backbone.encode(patches, hook=eq4)
    published.model.backbone.encode(patches, hook=rollout)
    assert eq4.row is not None and rollout.row is not None
    np.testing.assert_allclose(eq4.row, published.outputs["eq4_cls_row_normalised"], rtol=1e-5)
    np.testing.assert_allclose(rollout.row[:, 1:], published.outputs["rollout_cls_row"], rtol=1e-5)


@pytest.mark.shared
def test_inference_agrees_with_the_published_code(published: Published) -> None:
    attributes = published.model.predict(published.images).attributes
    np.testing.assert_allclose(attributes, published.outputs["inference_attributes"], rtol=1e-4, atol=1e-5)


@pytest.mark.shared
def test_losses_and_gradients_are_those_of_the_published_code(published: Published) -> None:
    published.config.optim.clip_norm = 0  # the stored norms are of unclipped gradients
    optimizer = build_optimizer(published.model, published.config.optim)
    losses, outputs = published.step(optimizer), published.outputs
    for ours, theirs in {"loss_cls": "loss_cls", "loss_patch": "loss_patch", "loss": "loss"}.items():
        assert losses[ours] == pytest.approx(float(outputs[theirs]), rel=1e-5), ours
    # a difference of nearly equal distributions: its last digits are float32's, there and here
    assert losses["loss_consistency"] == pytest.approx(float(outputs["loss_kl"]), abs=1e-6)
    assert losses["loss_group"] == pytest.approx(float(outputs["loss_attribute_group"]) / 0.3, rel=1e-5)
    norms = {
        published_name(name): p.grad.norm() for name, p in published.model.named_parameters() if p.grad is not None
    }
    stored = {name.removeprefix("gradnorm/"): v for name, v in outputs.items() if name.startswith("gradnorm/")}
    assert len(stored) == 10
    for name, norm in stored.items():
        assert float(norms[name]) == pytest.approx(float(norm), rel=1e-4), name


@pytest.mark.shared
def test_three_adam_steps_follow_the_published_code(published: Published) -> None:
    optimizer = build_optimizer(published.model, published.config.optim)
    trajectory = [published.step(optimizer)["loss"] for _ in range(3)]
    np.testing.assert_allclose(trajectory, published.outputs["loss_trajectory"], rtol=1e-4)
