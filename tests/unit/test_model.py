"""Both passes of the model and every switch of ModelConfig, against timm's own forward pass and plain NumPy.

The model is tiny: 32-pixel images in 4-pixel patches, so an 8x8 grid with 16 groups of which 5 are selected.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from svip import losses
from svip.config import ConfigError, ModelConfig
from svip.models.contextualization import WordsToPatch
from svip.models.patches import AttentionScores
from svip.models.svip import SVIP, Passes, pool

Array = NDArray[np.float64]

GRID, WIDTH, ATTRIBUTES, SELECTED = 8, 32, 5, 5
BLOCKS = [
    [GRID * row + column, GRID * row + column + 1, GRID * (row + 1) + column, GRID * (row + 1) + column + 1]
    for row in range(0, GRID, 2)
    for column in range(0, GRID, 2)
]
"""Raster numbers of each group's tokens: top-left, top-right, bottom-left, bottom-right."""
WORDS = torch.randn(ATTRIBUTES, 7, generator=torch.Generator().manual_seed(3))
SEEN = torch.rand(4, ATTRIBUTES, generator=torch.Generator().manual_seed(4))
TWO_PASSES = ("unselected", "all", "drop")
READOUTS = ("p2a", "cls", "both")


def build(image_size: int = 32, arguments: dict[str, Any] | None = None, **change: Any) -> SVIP:
    """A model in evaluation mode whose backbone has parameters large enough that all of them matter."""
    torch.manual_seed(0)
    shape = {"patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 4} | (arguments or {})
    settings: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "weights": "none", "hidden": 16}
    config = ModelConfig(**settings | {"backbone_args": shape, "selected_groups": SELECTED} | change)
    model = SVIP(config, image_size, WORDS)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def photos(size: int = 32, count: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)


def timms_own(model: SVIP, **arguments: Any) -> VisionTransformer:
    """A second vision transformer, made by timm alone, with the same weights."""
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=WIDTH,
        depth=2,
        num_heads=4,
        num_classes=0,
        **arguments,
    )
    assert isinstance(vit, VisionTransformer)
    vit.load_state_dict(model.backbone.vit.state_dict())
    return vit.eval()


def inputs(images: Tensor) -> Tensor:
    """As ViT-Tiny's weights expect them: -1 to 1."""
    return images / 127.5 - 1


def block_inputs(model: SVIP) -> list[Tensor]:
    """Fills with the tokens that enter the blocks, in each pass from now on."""
    seen: list[Tensor] = []
    model.backbone.vit.blocks.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    return seen


def placed(model: SVIP, patches: Tensor) -> Tensor:
    """The class token before the patches [B, N, D], all with their positions added."""
    vit = model.backbone.vit
    assert vit.cls_token is not None and vit.pos_embed is not None
    return torch.cat([vit.cls_token.expand(len(patches), 1, -1), patches], 1) + vit.pos_embed


def linear(layer: nn.Module | None, values: Array) -> Array:
    assert isinstance(layer, nn.Linear)
    return values @ array(layer.weight).T + array(layer.bias)


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def merged(patches: Array, blocks: list[list[int]] = BLOCKS) -> Array:
    """[B, N, D] -> [B, G, 4D]."""
    return np.stack([np.concatenate([patches[:, number] for number in block], -1) for block in blocks], 1)


def top(scores: Tensor, count: int = SELECTED) -> Tensor:
    """Mask of the highest scores [B, G] (no two are equal)."""
    return scores > scores.sort(1, descending=True).values[:, count : count + 1]


def read(model: SVIP, tokens: Tensor, selected: Tensor, prefix: int = 1) -> Array:
    """Sec. 3.5 in NumPy: final tokens -> attributes, with maximum pooling, for any read-out."""
    total = np.zeros((len(tokens), ATTRIBUTES))
    if model.config.readout in ("p2a", "both"):
        values = linear(model.patch_head, merged(array(tokens)[:, prefix:]))
        total += [rows[mask].max(0) for rows, mask in zip(values, selected.numpy(), strict=True)]
    if model.config.readout in ("cls", "both"):
        total += linear(model.class_head, array(tokens)[:, 0])
    return total


def contextualized_patches(model: SVIP, patches: Tensor, chosen: Tensor) -> Tensor:
    """Eq. 9 token by token: e is added to the four tokens of each chosen group."""
    assert model.context is not None
    result = patches.clone()
    for image, group in chosen.nonzero().tolist():
        for part, number in enumerate(BLOCKS[group]):
            result[image, number] += model.context()[part]
    return result


def objective(model: SVIP, passes: Passes) -> Tensor:
    """Eq. 14 on any classes."""
    targets = torch.tensor([0, 2, 3])
    source = model.class_scores(passes.source, SEEN)
    loss = losses.classification(source, targets)
    if passes.contextualized is not None:
        contextualized = model.class_scores(passes.contextualized, SEEN)
        loss = loss + losses.classification(contextualized, targets)
        loss = loss + losses.consistency(source, contextualized, "jeffreys")
    if passes.patch_logits is not None and passes.patch_targets is not None:
        loss = loss + losses.patch(passes.patch_logits, passes.patch_targets)
    return loss


def close(actual: Tensor | None, expected: Array, tolerance: float = 1e-5) -> None:
    assert actual is not None
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


# Pass 1, scores and selection


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_pass_one_reads_timms_own_forward_pass(registers: int, readout: str) -> None:
    model = build(arguments={"reg_tokens": registers}, readout=readout)
    tokens = timms_own(model, reg_tokens=registers).forward_features(inputs(photos()))
    selected = model.predict(photos()).selected
    close(model(photos()).source, read(model, tokens, selected, 1 + registers))


@torch.no_grad()
def test_images_are_normalized_as_the_pretrained_weights_expect() -> None:
    model = build(backbone="deit_tiny_patch16_224.fb_in1k")
    image = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = [-0.485 / 0.229, (127 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    close(model.normalize(image)[0, :, 7, 9], np.array(expected))


@torch.no_grad()
def test_classifier_sees_merged_patches_without_position_and_selects_its_highest() -> None:
    model = build()
    assert model.patch_classifier is not None
    patches = timms_own(model).patch_embed(inputs(photos()))
    hidden = np.maximum(linear(model.patch_classifier[0], merged(array(patches))), 0)
    expected = linear(model.patch_classifier[2], hidden)[..., 0]
    close(model(photos()).patch_logits, expected)
    assert torch.equal(model.predict(photos()).selected, top(torch.from_numpy(expected)))


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_targets_are_eq4s_scores_of_pass_one_averaged_in_blocks_and_stretched(
    registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(arguments={"reg_tokens": registers})
    vit = timms_own(model, reg_tokens=registers)
    maps: list[Array] = []
    for block in vit.blocks.children():
        assert isinstance(block.attn, Attention)
        monkeypatch.setattr(block.attn, "fused_attn", False)  # then its attention map passes through the dropout
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(array(output).sum(1)))
    vit.forward_features(inputs(photos()))
    row = (maps[0] + maps[0] @ maps[1])[:, 0, 1 + registers :]
    scores = np.stack([row[:, block].mean(1) for block in BLOCKS], 1)
    low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    close(model(photos()).patch_targets, (scores - low) / (high - low), 1e-4)


# The contextual embedding


def test_w2p_maps_words_and_then_attributes() -> None:
    context = WordsToPatch(WORDS, WIDTH)
    first, second = context.to_width, context.to_tokens
    embedded = np.einsum("dv,av->ad", array(first.weight), array(WORDS)) + array(first.bias)
    expected = np.einsum("ka,ad->kd", array(second.weight), embedded) + array(second.bias)[:, None]
    close(context(), expected)


def test_words_are_saved_and_constants_are_not() -> None:
    state = build().state_dict()
    assert torch.equal(state["context.words"], WORDS)
    assert not {"index", "mean", "std"} & state.keys()


def test_random_context_is_a_parameter_that_knows_no_words() -> None:
    model = build(context="random")
    assert "context.words" not in model.state_dict()
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("context")} == {
        "context.embedding": (4, WIDTH)
    }
    assert model.context is not None and model.context().std() > 0


@pytest.mark.parametrize("context", ["w2p", "random"])
@pytest.mark.parametrize("contextualize", ["unselected", "all"])
def test_with_a_zero_context_pass_two_is_pass_one_but_learns(contextualize: str, context: str) -> None:
    model = build(contextualize=contextualize, context=context, context_init="zero")
    passes = model(photos())
    assert passes.contextualized is not None
    assert torch.equal(passes.contextualized, passes.source)
    objective(model, passes).backward()
    assert model.context is not None
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.context.parameters())


# Pass 2: what `contextualize` says


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("context", ["w2p", "random"])
@torch.no_grad()
def test_unselected_groups_alone_receive_e(context: str, readout: str) -> None:
    model = build(context=context, readout=readout)
    vit, entered = timms_own(model), block_inputs(model)
    passes = model(photos())
    assert passes.patch_logits is not None
    selected = top(passes.patch_logits)
    patches = vit.patch_embed(inputs(photos()))
    expected = placed(model, contextualized_patches(model, patches, ~selected))
    torch.testing.assert_close(entered, [placed(model, patches), expected])
    close(passes.contextualized, read(model, vit.norm(vit.blocks(expected)), selected))


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_all_groups_receive_e_and_are_read_and_none_is_selected(readout: str) -> None:
    model = build(contextualize="all", readout=readout, selected_groups=999)
    vit, everything = timms_own(model), torch.ones(3, 16, dtype=torch.bool)
    passes = model(photos())
    assert model.patch_classifier is None and passes.patch_logits is None and passes.patch_targets is None
    patches = vit.patch_embed(inputs(photos()))
    close(passes.source, read(model, vit.norm(vit.blocks(placed(model, patches))), everything))
    tokens = vit.norm(vit.blocks(placed(model, contextualized_patches(model, patches, everything))))
    close(passes.contextualized, read(model, tokens, everything))
    assert torch.equal(model.predict(photos()).selected, everything)


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_dropped_groups_might_as_well_not_exist(readout: str) -> None:
    model = build(contextualize="drop", readout=readout)
    vit, entered = timms_own(model), block_inputs(model)
    prediction = model.predict(photos())
    assert [tokens.shape for tokens in entered] == [(3, 1 + 4 * SELECTED, WIDTH)]
    assert model.context is None
    sequence = placed(model, vit.patch_embed(inputs(photos())))
    for image, mask in enumerate(prediction.selected):
        kept = sorted(number for group in mask.nonzero() for number in BLOCKS[group])
        tokens = torch.zeros(1, 1 + GRID**2, WIDTH)
        rows = [0, *(1 + number for number in kept)]
        tokens[:, rows] = vit.norm(vit.blocks(sequence[image : image + 1, rows]))
        close(prediction.attributes[image], read(model, tokens, mask[None])[0])


@torch.no_grad()
def test_dropping_nothing_changes_nothing() -> None:
    passes = build(contextualize="drop", selected_groups=16)(photos())
    torch.testing.assert_close(passes.contextualized, passes.source)


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_without_contextualization_there_is_one_pass(readout: str) -> None:
    model = build(contextualize="none", readout=readout)
    entered = block_inputs(model)
    passes = model(photos())
    assert passes.contextualized is None and model.context is None
    assert len(entered) == 1
    torch.testing.assert_close(model.predict(photos()).attributes, passes.source)


@torch.no_grad()
def test_baseline_of_the_class_token_needs_no_patches() -> None:
    model = build(contextualize="none", readout="cls", selected_groups=999)
    passes, prediction = model(photos()), model.predict(photos())
    assert passes.patch_logits is None and passes.patch_targets is None and prediction.localization is None
    assert prediction.selected.all() and prediction.selected.shape == (3, 16)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"backbone", "class_head"}


# Read-out and logits


@pytest.mark.parametrize(("how", "expected"), [("max", [-3, 4]), ("mean", [-4, -2])])
def test_pooling_sees_the_selected_groups_alone(how: str, expected: list[float]) -> None:
    values = torch.tensor([[[-5.0, 4.0], [9.0, 9.0], [-3.0, -8.0], [-99.0, -99.0]]])
    assert pool(values, torch.tensor([[True, False, True, False]]), how).tolist() == [expected]


@pytest.mark.parametrize("pooling", ["max", "mean"])
@torch.no_grad()
def test_localization_holds_the_values_before_pooling(pooling: str) -> None:
    prediction = build(pooling=pooling).predict(photos())
    assert prediction.localization is not None and prediction.localization.shape == (3, 16, ATTRIBUTES)
    chosen = array(prediction.localization)[prediction.selected.numpy()].reshape(3, SELECTED, ATTRIBUTES)
    close(prediction.attributes, chosen.max(1) if pooling == "max" else chosen.mean(1))


def test_logits_are_sigma_times_the_cosine() -> None:
    model = build(sigma=10.0, contextualize="none", readout="cls")
    predicted = torch.tensor([[3.0, 4.0], [-0.03, -0.04], [0.0, 0.0]])
    classes = torch.tensor([[4.0, 3.0], [300.0, 400.0], [0.4, -0.3]])
    expected = [[9.6, 10, 0], [-9.6, -10, 0], [0, 0, 0]]
    close(model.class_scores(predicted, classes), np.array(expected))


@pytest.mark.parametrize("contextualize", [*TWO_PASSES, "none"])
@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_prediction_is_the_last_pass_of_training_alone(readout: str, contextualize: str) -> None:
    model = build(contextualize=contextualize, readout=readout)
    passes = model(photos())
    entered = block_inputs(model)
    prediction = model.predict(photos())
    assert len(entered) == 1
    torch.testing.assert_close(
        prediction.attributes, passes.source if passes.contextualized is None else passes.contextualized
    )


def test_prediction_of_an_image_does_not_depend_on_the_others() -> None:
    model = build()
    torch.testing.assert_close(model.predict(photos()).attributes[1:2], model.predict(photos()[1:2]).attributes)


# Gradients


@pytest.mark.parametrize("context", ["w2p", "random"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("contextualize", [*TWO_PASSES, "none"])
def test_every_parameter_learns(contextualize: str, readout: str, context: str) -> None:
    model = build(contextualize=contextualize, readout=readout, context=context).train()
    objective(model, model(photos())).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_patch_loss_trains_the_patch_classifier_alone() -> None:
    model = build().train()
    passes = model(photos())
    assert passes.patch_logits is not None and passes.patch_targets is not None
    assert not passes.patch_targets.requires_grad
    losses.patch(passes.patch_logits, passes.patch_targets).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"patch_classifier"}


def test_attributes_do_not_train_the_patch_classifier() -> None:
    model = build().train()
    passes = model(photos())
    assert passes.contextualized is not None
    (passes.source + passes.contextualized).sum().backward()
    assert model.patch_classifier is not None
    assert all(parameter.grad is None for parameter in model.patch_classifier.parameters())


def test_all_but_the_backbone_learns_in_the_head_stage() -> None:
    model = build(readout="both").train()
    model.backbone.set_trainable(False)
    objective(model, model(photos())).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"patch_classifier", "context", "patch_head", "class_head"}


def test_prediction_keeps_no_graph() -> None:
    prediction = build().predict(photos())
    assert not prediction.attributes.requires_grad
    assert prediction.localization is not None and not prediction.localization.requires_grad


# Precision, geometry, mistakes


@torch.no_grad()
def test_under_bf16_scores_and_results_stay_in_float32() -> None:
    model, scores = build(), AttentionScores()
    with torch.autocast("cpu", torch.bfloat16):
        passes = model(photos())
        patches = model.backbone.embed(model.normalize(photos()))
        model.backbone.encode(patches, hook=scores)
    assert patches.dtype == torch.bfloat16
    for values in (scores.row, passes.source, passes.contextualized, passes.patch_logits, passes.patch_targets):
        assert values is not None and values.dtype == torch.float32
    assert scores.row is not None
    torch.testing.assert_close(scores.row.sum(1), torch.ones(3))
    torch.testing.assert_close(passes.source, model(photos()).source, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("patch", "size", "groups"), [(8, 32, 4), (4, 24, 9), (16, 224, 49), (14, 224, 64)])
def test_geometry_follows_the_backbone(patch: int, size: int, groups: int) -> None:
    model = build(size, {"patch_size": patch, "depth": 1}, selected_groups=3)
    passes, prediction = model(photos(size)), model.predict(photos(size))
    assert passes.source.shape == (3, ATTRIBUTES)
    assert passes.patch_targets is not None and passes.patch_targets.shape == (3, groups)
    assert prediction.selected.sum(1).tolist() == [3, 3, 3]
    assert prediction.localization is not None and prediction.localization.shape == (3, groups, ATTRIBUTES)


def test_odd_grid_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match="7x7 grid .*data.image_size"):
        build(28)


@pytest.mark.parametrize("count", [0, -1, 17])
def test_impossible_number_of_selected_groups_is_refused(count: int) -> None:
    message = f"model.selected_groups={count}: expected 1 to 16, the number of merged groups of a 8x8 grid"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(selected_groups=count)
