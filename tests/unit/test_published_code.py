"""The model and the losses against what the authors' published code returned for seeded weights and images."""

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

from svip.config import ModelConfig
from svip.losses import classification, consistency, patch
from svip.models.contextualization import FreeContext
from svip.models.patches import AttentionScores, select
from svip.models.svip import SVIP

Array = NDArray[Any]


@dataclass(frozen=True)
class Published:
    """A ViT-B of depth 2 with the stored run's weights, its images, and what the published code made of them."""

    model: SVIP
    images: Tensor
    outputs: dict[str, Array]


@pytest.fixture(scope="module")
def outputs(shared: Path) -> dict[str, Array]:
    path = shared / "golden" / "published_code_cub.npz"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    return {name: values for name, values in np.load(path).items() if name != "spec"}


@pytest.fixture(scope="module")
def published(outputs: dict[str, Array]) -> Published:
    random = np.random.default_rng(11)
    words = torch.from_numpy(random.standard_normal((312, 300)).astype(np.float32))
    noise = torch.from_numpy(random.standard_normal((3, 3, 224, 224)).astype(np.float32))
    config = ModelConfig(
        backbone="vit_base_patch16_224",
        backbone_args={"depth": 2},
        weights="none",
        selected_groups=40,
        pooling="mean",
    )
    model = SVIP(config, 224, words).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(published_weights(name, tuple(parameter.shape))))
    return Published(
        model,
        F.avg_pool2d(noise, 9, 1, 4) * 4 + torch.linspace(-1, 1, 224)[None, None, :, None],
        outputs,
    )


def published_weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The stored run's values of a parameter: they are seeded by its name in the published code."""
    for ours, theirs in {
        "backbone.vit.": "",
        "patch_classifier.": "token_cls.",
        "context.to_width.": "v2p.",
        "context.to_tokens.": "p2t.",
        "patch_head.": "head_1.",
    }.items():
        name = name.replace(ours, theirs)
    values = np.random.default_rng([11, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return (1 + 0.1 * values).astype(np.float32)
    return (values * (0.04 if len(shape) > 1 else 0.02)).astype(np.float32)


@pytest.mark.shared
@torch.no_grad()
def test_pass_one_agrees_with_the_published_code(published: Published) -> None:
    model, scores = published.model, AttentionScores()
    patches = model.backbone.embed(published.images)
    tokens = model.backbone.encode(patches, hook=scores)
    assert scores.row is not None
    np.testing.assert_allclose(scores.row, published.outputs["eq4_cls_row_normalised"], rtol=1e-5)
    logits, _ = model.select_patches(patches)
    assert logits is not None
    np.testing.assert_allclose(logits.sigmoid(), published.outputs["patch_scores"], rtol=1e-5, atol=1e-5)
    related = torch.from_numpy(published.outputs["patch_labels"] == 0)
    attributes, _ = model.read(tokens, related)
    np.testing.assert_allclose(attributes, published.outputs["source_attributes"], rtol=1e-4, atol=1e-4)


@pytest.mark.shared
@torch.no_grad()
def test_inference_agrees_with_the_published_code(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    model = published.model
    interleaved = FreeContext(model.backbone.width)
    assert model.context is not None
    # the published code flattens [D, 4] as it is, which gives each sub-token a mix of channels
    interleaved.embedding.copy_(model.context().T.reshape(4, -1))
    monkeypatch.setitem(model._modules, "context", interleaved)
    patches = model.backbone.embed(published.images)
    logits, _ = model.select_patches(patches)
    assert logits is not None
    related = select(-logits, 40)  # its classifier finds the unrelated
    tokens, _ = model.encode_contextualized(patches, related)
    attributes, _ = model.read(tokens, torch.ones_like(related))  # it reads all groups here
    np.testing.assert_allclose(attributes, published.outputs["inference_attributes"], rtol=1e-4, atol=1e-4)


@pytest.mark.shared
def test_losses_are_those_of_the_published_code(outputs: dict[str, Array]) -> None:
    golden = {name: torch.from_numpy(array) for name, array in outputs.items()}
    random = np.random.default_rng(11)
    random.standard_normal(312 * 300 + 3 * 3 * 224 * 224)  # word vectors and images come first
    attributes = torch.from_numpy(random.random((150, 312)).astype(np.float32))
    attributes /= attributes.norm(dim=1, keepdim=True) + 1e-5
    targets = torch.from_numpy(random.integers(0, 150, 3))
    source = golden["source_attributes"] @ attributes.T
    contextualized = golden["contextualized_attributes"] @ attributes.T

    both = classification(5 * source, targets) + classification(5 * contextualized, targets)
    torch.testing.assert_close(both, golden["loss_cls"], rtol=1e-4, atol=0)
    # temperature 20, squared as a weight, and averaged over the classes too
    kl = consistency(source / 20, contextualized / 20, "kl") * 20**2 / 150
    torch.testing.assert_close(kl, golden["loss_kl"], rtol=1e-3, atol=0)
    found = patch(golden["patch_scores"].logit(), golden["patch_labels"])
    torch.testing.assert_close(found, golden["loss_patch"], rtol=1e-4, atol=0)
