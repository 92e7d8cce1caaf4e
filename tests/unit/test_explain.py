"""What is shown of a model, against plain loops over full attention maps, tokens and layers.

The model is tiny: 32-pixel images in 4-pixel patches, so an 8x8 grid with 16 groups of which 5 are selected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svip.config import ModelConfig
from svip.evaluation.explain import attention_by_layer, explain, hidden_features, in_plane, separation
from svip.models.svip import SVIP

GRID, WIDTH, ATTRIBUTES, SELECTED, HEADS = 8, 32, 5, 5, 4
BLOCKS = [
    [GRID * row + column, GRID * row + column + 1, GRID * (row + 1) + column, GRID * (row + 1) + column + 1]
    for row in range(0, GRID, 2)
    for column in range(0, GRID, 2)
]
"""Raster numbers of each group's tokens: top-left, top-right, bottom-left, bottom-right."""


def build(**change: Any) -> SVIP:
    """A model in evaluation mode whose backbone has parameters large enough that all of them matter."""
    torch.manual_seed(0)
    shape = {"patch_size": 4, "embed_dim": WIDTH, "depth": 3, "num_heads": HEADS}
    settings: dict[str, Any] = {"weights": "none", "hidden": 16, "selected_groups": SELECTED} | change
    config = ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=shape, **settings)
    model = SVIP(config, 32, torch.randn(ATTRIBUTES, 7))
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def photos() -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=random)


@torch.no_grad()
def full_maps(model: SVIP, images: Tensor) -> list[Tensor]:
    """Every head's whole attention map in each block, float64 [B, h, T, T], from the blocks' own weights."""
    vit, maps = model.backbone.vit, []
    tokens = vit._pos_embed(vit.patch_embed(model.normalize(images)))
    for block in vit.blocks.children():
        qkv: Tensor = block.attn.qkv(block.norm1(tokens))  # type: ignore[union-attr, operator]
        query, key, _ = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2).double() for part in qkv.chunk(3, -1))
        maps.append((query @ key.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1))
        tokens = block(tokens)
    return maps


def test_each_layers_attention_is_the_class_tokens_row_of_the_full_map(photos: Tensor) -> None:
    model = build()
    layers, _ = attention_by_layer(model, photos)
    expected = np.empty((3, 3, len(BLOCKS)))
    for layer, attention in enumerate(full_maps(model, photos)):
        row = attention.mean(1)[:, 0, 1:]  # without the class token itself
        for group, tokens in enumerate(BLOCKS):
            expected[:, layer, group] = sum(row[:, token] for token in tokens) / 4
    np.testing.assert_allclose(layers, expected, rtol=1e-4)


def test_the_aggregated_score_is_equation_4_over_full_matrices(photos: Tensor) -> None:
    model = build()
    _, scores = attention_by_layer(model, photos)
    first, *others = (attention.sum(1) for attention in full_maps(model, photos))
    whole = first
    for attention in others:
        whole = whole + whole @ attention
    row = whole[:, 0].numpy()
    row /= row.sum(1, keepdims=True)
    np.testing.assert_allclose(scores, row[:, 1:][:, BLOCKS].mean(-1), rtol=1e-4)


@pytest.mark.parametrize("contextualize", ["unselected", "none"])
def test_a_map_is_p2as_output_whose_highest_selected_group_is_the_prediction(
    photos: Tensor, contextualize: str
) -> None:
    model = build(contextualize=contextualize)
    seen = explain(model, photos)
    assert seen.maps.shape == (3, 4, 4, ATTRIBUTES)
    assert (seen.selected.sum((1, 2)) == SELECTED).all()
    for k in range(3):
        np.testing.assert_allclose(seen.maps[k][seen.selected[k]].max(0), seen.attributes[k], rtol=1e-5)
    np.testing.assert_array_equal(seen.images, photos.numpy().transpose(0, 2, 3, 1))


def test_dropped_groups_have_no_value_and_the_others_keep_their_place(photos: Tensor) -> None:
    model = build(contextualize="drop")
    seen = explain(model, photos)
    np.testing.assert_array_equal(np.isfinite(seen.maps), np.repeat(seen.selected[..., None], ATTRIBUTES, -1))
    with torch.no_grad():
        patches = model.backbone.embed(model.normalize(photos))
        for k in range(3):
            groups = [BLOCKS[group] for group in np.flatnonzero(seen.selected[k])]
            tokens = model.backbone.encode(patches[k : k + 1], keep=torch.tensor([sum(groups, [])]))[0, 1:]
            assert model.patch_head is not None
            for place, group in enumerate(np.flatnonzero(seen.selected[k])):
                expected = model.patch_head(tokens[4 * place : 4 * place + 4].flatten())
                np.testing.assert_allclose(seen.maps[k].reshape(16, -1)[group], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contextualize", ["none", "unselected", "drop"])
def test_a_model_of_the_class_token_shows_its_head_on_each_patch_token(photos: Tensor, contextualize: str) -> None:
    model = build(contextualize=contextualize, readout="cls")
    seen = explain(model, photos)
    assert model.class_head is not None
    with torch.no_grad():
        patches = model.backbone.embed(model.normalize(photos))
        tokens, _ = model.encode_contextualized(patches, torch.from_numpy(seen.selected).flatten(1))
    for k in range(3):
        there = np.flatnonzero(seen.selected[k]) if contextualize == "drop" else np.arange(16)
        for place, group in enumerate(there.tolist()):
            members = range(4 * place, 4 * place + 4) if contextualize == "drop" else BLOCKS[group]
            values = [model.class_head(tokens[k, 1 + token]).detach().numpy() for token in members]
            np.testing.assert_allclose(seen.maps[k].reshape(16, -1)[group], sum(values) / 4, rtol=1e-4, atol=1e-5)
    assert np.isfinite(seen.maps).all() == (contextualize != "drop")


def test_hidden_features_are_those_of_the_classifiers_first_layer(photos: Tensor) -> None:
    model = build()
    features = hidden_features(model, photos)
    assert features.shape == (3, 16, 16)
    assert model.patch_classifier is not None
    weight, bias = (model.patch_classifier.state_dict()[name].numpy() for name in ("0.weight", "0.bias"))
    with torch.no_grad():
        patches = model.backbone.embed(model.normalize(photos)).numpy()
    for group, tokens in enumerate(BLOCKS):
        raw = np.concatenate([patches[:, token] for token in tokens], 1)
        np.testing.assert_allclose(features[:, group], np.maximum(raw @ weight.T + bias, 0), rtol=1e-4, atol=1e-5)


def test_hidden_features_need_a_patch_classifier(photos: Tensor) -> None:
    with pytest.raises(ValueError, match="has no patch classifier"):
        hidden_features(build(contextualize="all"), photos)


@pytest.mark.parametrize("count", [2, 7, 100])
def test_the_plane_is_the_same_each_time(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    points = in_plane(vectors, "cosine")
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()
    np.testing.assert_array_equal(points, in_plane(vectors, "cosine"))


def test_separation_is_the_mean_silhouette() -> None:
    vectors = np.array([[0], [1], [10], [11]], np.float32)
    # own class 1 away; the other class 10.5 on average from the outer points, 9.5 from the inner ones
    assert separation(vectors, np.array([0, 0, 1, 1])) == pytest.approx((9.5 / 10.5 + 8.5 / 9.5) / 2)
