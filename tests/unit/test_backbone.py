"""The two halves of a timm vision transformer, held against timm's own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention
from torch import Tensor

from svip.config import ConfigError, ModelConfig
from svip.models.backbone import Backbone

VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 3},
    {"reg_tokens": 2, "no_embed_class": True},
    {"pre_norm": True},
    {"qk_norm": True},
]
"""Further arguments of vision transformers whose forward passes differ (DINOv2, DeiT III, CLIP, ViT-22B ...)."""


def configure(arguments: dict[str, Any] | None = None, **change: Any) -> ModelConfig:
    """Two narrow blocks on 8-pixel patches."""
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | (arguments or {})
    return ModelConfig(**{"backbone": "vit_tiny_patch16_224", "backbone_args": shape, "weights": "none"} | change)


def tiny(image_size: int = 32, arguments: dict[str, Any] | None = None, **change: Any) -> Backbone:
    """A backbone whose random parameters are large enough that all of them matter."""
    torch.manual_seed(0)
    backbone = Backbone(configure(arguments, **change), image_size).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.vit.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@torch.no_grad()
def test_both_halves_are_timms_forward_pass(arguments: dict[str, Any]) -> None:
    backbone = tiny(arguments=arguments)
    tokens = backbone.encode(backbone.embed(images()))
    assert tokens.shape == (3, backbone.prefix + 16, 32)
    torch.testing.assert_close(tokens, backbone.vit.forward_features(images()))


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@torch.no_grad()
def test_hook_sees_the_attention_of_every_block_in_order(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny(arguments={"depth": 3} | arguments)
    expected: list[Tensor] = []
    for block in backbone.vit.blocks.children():
        assert isinstance(block.attn, Attention)
        monkeypatch.setattr(block.attn, "fused_attn", False)  # then its attention map passes through the dropout
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: expected.append(output))
    seen: list[Tensor] = []
    backbone.encode(
        backbone.embed(images()), hook=lambda query, key, scale: seen.append((scale * query @ key.mT).softmax(-1))
    )
    assert len(expected) == 3
    assert expected[0].std() > 0.01  # not the uniform attention of a fresh model
    torch.testing.assert_close(seen, expected)


def test_hook_changes_nothing_keeps_no_graph_and_stays_for_one_call() -> None:
    backbone = tiny(arguments={"qk_norm": True})
    patches = backbone.embed(images())
    calls: list[tuple[Tensor, Tensor, float]] = []
    watched = backbone.encode(patches, hook=lambda *arguments: calls.append(arguments))
    assert torch.equal(backbone.encode(patches), watched)
    assert [scale for _, _, scale in calls] == [8**-0.5, 8**-0.5]
    for query, key, _ in calls:
        assert query.shape == key.shape == (3, 4, 17, 8)
        assert watched.requires_grad and not query.requires_grad and not key.requires_grad


def test_failing_hook_is_removed_too() -> None:
    def fail(query: Tensor, key: Tensor, scale: float) -> None:
        raise ZeroDivisionError

    backbone = tiny()
    patches = backbone.embed(images())
    with pytest.raises(ZeroDivisionError):
        backbone.encode(patches, hook=fail)
    backbone.encode(patches)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@torch.no_grad()
def test_kept_tokens_are_all_that_the_blocks_see(arguments: dict[str, Any]) -> None:
    backbone = tiny(arguments=arguments)
    vit, prefix = backbone.vit, backbone.prefix
    patches = backbone.embed(images())
    keep = torch.tensor([[0, 5, 9], [15, 2, 3], [7, 8, 1]])
    placed = vit._pos_embed(patches)
    for image, numbers in enumerate(keep.tolist()):
        rows = [*range(prefix), *(prefix + number for number in numbers)]
        alone = vit.norm(vit.blocks(vit.norm_pre(placed[image : image + 1, rows])))
        torch.testing.assert_close(backbone.encode(patches, keep)[image : image + 1], alone)


@pytest.mark.parametrize(("patch", "size", "grid"), [(8, 48, (6, 6)), (14, 224, (16, 16)), (16, 224, (14, 14))])
def test_grid_follows_image_and_patch_size(patch: int, size: int, grid: tuple[int, int]) -> None:
    backbone = tiny(size, {"patch_size": patch})
    assert backbone.grid == grid
    assert backbone.embed(images(size)).shape == (3, grid[0] * grid[1], 32)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("deit_tiny_patch16_224.fb_in1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_normalization_is_that_of_the_pretrained_weights(
    name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    assert tiny(backbone=name).normalization == (mean, std)


def test_all_is_trained_without_frozen_blocks() -> None:
    backbone = tiny()
    backbone.set_trainable(True)
    assert trained(backbone) == {name for name, _ in backbone.vit.named_parameters()}


@pytest.mark.parametrize(("frozen", "prefixes"), [(1, ("blocks.1.", "blocks.2.", "norm.")), (3, ("norm.",))])
def test_frozen_blocks_and_the_embeddings_below_are_not_trained(frozen: int, prefixes: tuple[str, ...]) -> None:
    backbone = tiny(arguments={"depth": 3}, frozen_blocks=frozen)
    backbone.set_trainable(True)
    assert trained(backbone) == {name for name, _ in backbone.vit.named_parameters() if name.startswith(prefixes)}


def test_head_stage_trains_nothing_and_ends() -> None:
    backbone = tiny(frozen_blocks=1)
    backbone.set_trainable(True)
    later = trained(backbone)
    backbone.set_trainable(False)
    assert trained(backbone) == set()
    backbone.set_trainable(True)
    assert trained(backbone) == later != set()


@pytest.mark.parametrize("frozen", [-1, 3])
def test_more_frozen_blocks_than_there_are_is_refused(frozen: int) -> None:
    with pytest.raises(ConfigError, match=f"model.frozen_blocks={frozen}: expected 0 to 2"):
        tiny(frozen_blocks=frozen)


def stored(backbone: Backbone, folder: Path) -> str:
    save_file(backbone.vit.state_dict(), folder / "vit.safetensors")
    return str(folder / "vit.safetensors")


def test_weights_are_read_from_a_file(tmp_path: Path) -> None:
    written = tiny()
    read = Backbone(configure(weights=stored(written, tmp_path)), 32)
    torch.testing.assert_close(read.state_dict(), written.state_dict(), rtol=0, atol=0)


def test_positions_of_a_file_are_resampled_to_the_grid(tmp_path: Path) -> None:
    written = tiny()
    table = written.vit.pos_embed
    assert table is not None
    with torch.no_grad():
        table[:, 1:] = torch.arange(32.0)  # the same everywhere, so it has to stay the same on any grid
    larger = Backbone(configure(weights=stored(written, tmp_path)), 48).vit.pos_embed
    assert larger is not None
    torch.testing.assert_close(larger, torch.cat([table[:, :1], torch.arange(32.0).expand(1, 36, 32)], 1))


def test_unusable_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(b"pickle")
    (tmp_path / "text.safetensors").write_text("not a header")
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for name, message in {
        "none.safetensors": "no file .*none.safetensors; expected 'timm', 'none' or",
        "vit.pth": "vit.pth is not a .safetensors file",
        "text.safetensors": "text.safetensors cannot be read as safetensors",
        "foreign.safetensors": "foreign.safetensors lacks 30 tensors of vit_tiny_patch16_224, such as blocks.0",
    }.items():
        with pytest.raises(ConfigError, match=f"model.weights: .*{message}"):
            tiny(weights=str(tmp_path / name))


def test_weights_that_cannot_be_downloaded_say_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"weights=FILE\.safetensors\), or .*weights=none"):
        Backbone(ModelConfig(backbone="vit_tiny_patch16_224", weights="timm"), 224)


def test_weights_of_a_shallower_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.weights: .* lacks 12 tensors .* such as blocks.2."):
        tiny(arguments={"depth": 3}, weights=stored(tiny(), tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "timm knows no 'vit_tiny_patch16_225'; perhaps one of vit_tiny_patch16_224,"),
        ("nope", r"timm knows no 'nope'; perhaps one of \w+,"),
        ("resnet18", "timm cannot build resnet18 at 32 px: .*img_size"),
        ("beit_base_patch16_224", "is not a plain vision transformer"),
        ("vit_small_patch16_18x2_224", "is not a plain vision transformer"),  # two attentions a block
    ],
)
def test_unusable_backbone_is_named(name: str, message: str) -> None:
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 1} if "_" in name else {}
    with pytest.raises(ConfigError, match=f"model.backbone: .*{message}"):
        Backbone(configure(backbone=name, backbone_args=arguments), 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3}, "unexpected keyword argument 'layers'"),
        ({"embed_dim": 33}, "divisible by num_heads"),
        ({"class_token": False}, "class token"),
    ],
)
def test_unusable_backbone_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.backbone: .*{message}"):
        tiny(arguments=arguments)
