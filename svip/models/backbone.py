"""A timm vision transformer in two halves: patch embedding, and everything after it.

SVIP changes tokens between the two and needs each block's attention once, without keeping any map.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from svip.config import ConfigError, ModelConfig
from svip.models.weights import NO_FILE, stored_names

AttentionHook = Callable[[Tensor, Tensor, float], None]
"""Called in every block, in order, with queries and keys [B, h, T, d] and the scale of their products."""


class Backbone(nn.Module):
    """A timm ViT with a class token; T tokens = prefix tokens (class token first) + N patch tokens."""

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.vit = _create(config, image_size)
        self.width: int = self.vit.embed_dim
        self.prefix: int = self.vit.num_prefix_tokens
        height, width = self.vit.patch_embed.grid_size
        self.grid: tuple[int, int] = (height, width)
        if not 0 <= config.frozen_blocks <= len(self.vit.blocks):
            raise ConfigError(
                f"model.frozen_blocks={config.frozen_blocks}: expected 0 to {len(self.vit.blocks)}, "
                f"the number of blocks of {config.backbone}"
            )
        self.frozen_blocks = config.frozen_blocks
        settings = resolve_model_data_config(self.vit)
        self.normalization: tuple[tuple[float, ...], tuple[float, ...]] = (settings["mean"], settings["std"])
        """Mean and standard deviation of each channel that the weights expect, in 0..1."""

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: patch embeddings without position, [B, N, D], of normalised images [B, 3, S, S]."""
        embedded: Tensor = self.vit.patch_embed(images)
        return embedded

    def encode(self, patches: Tensor, keep: Tensor | None = None, hook: AttentionHook | None = None) -> Tensor:
        """Eqs. 2-3: patch embeddings [B, N, D] -> normalised final tokens [B, T, D].

        ``keep`` [B, K], indices of patch tokens, drops all others after position embedding: [B, prefix + K, D].
        """
        tokens = self.vit._pos_embed(patches)
        if keep is not None:
            index = (keep + self.prefix).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = torch.cat([tokens[:, : self.prefix], tokens.gather(1, index)], 1)
        tokens = self.vit.norm_pre(tokens)
        with _watching(self.vit, hook):
            tokens = self.vit.blocks(tokens)
        normalised: Tensor = self.vit.norm(tokens)
        return normalised

    def set_trainable(self, trainable: bool) -> None:
        """Train the blocks above the frozen ones, or (in the head-only stage) nothing."""
        self.vit.requires_grad_(trainable)
        if trainable and self.frozen_blocks:
            self.vit.requires_grad_(False)
            self.vit.blocks[self.frozen_blocks :].requires_grad_(True)
            self.vit.norm.requires_grad_(True)


def _create(config: ModelConfig, image_size: int) -> VisionTransformer:
    local = config.weights not in NO_FILE
    stored = stored_names(config.weights)
    name = config.backbone.split(".")[0]
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0)
        raise ConfigError(f"model.backbone: timm knows no {config.backbone!r}; perhaps one of {', '.join(close)}")
    try:
        vit = timm.create_model(
            config.backbone,
            pretrained=config.weights != "none",
            # file= rather than checkpoint_path=: only this way is the position embedding resampled to the grid
            pretrained_cfg_overlay={"file": config.weights} if local else None,
            img_size=image_size,
            num_classes=0,
            global_pool="token",
            **config.backbone_args,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.backbone: timm cannot build {config.backbone} at {image_size} px: {error}") from error
    except OSError as error:  # of the Hub's client
        raise OSError(
            f"the weights of {config.backbone} can't be downloaded; give a file with timm's keys "
            f"(model.weights=FILE.safetensors), or begin at random (model.weights=none). {' '.join(str(error).split())}"
        ) from error
    if (
        not isinstance(vit, VisionTransformer)
        or vit.cls_token is None
        or not all(isinstance(getattr(block, "attn", None), Attention) for block in vit.blocks)  # parallel branches
    ):
        raise ConfigError(f"model.backbone: {config.backbone} is not a plain vision transformer with a class token")
    missing = sorted(vit.state_dict().keys() - stored)
    if local and missing:  # timm would leave them at random without a word
        raise ConfigError(
            f"model.weights: {config.weights} lacks {len(missing)} tensors of {config.backbone}, such as {missing[0]}; "
            "expected timm's keys"
        )
    return vit


@contextmanager
def _watching(vit: VisionTransformer, hook: AttentionHook | None) -> Iterator[None]:
    """Hand every block's queries and keys to ``hook`` while the blocks run; the blocks keep their fused attention."""
    handles = []
    if hook is not None:
        for block in vit.blocks.children():
            attention = block.attn
            assert isinstance(attention, Attention)
            handles.append(attention.qkv.register_forward_hook(_watch(attention, hook)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(attention: Attention, hook: AttentionHook) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    @torch.no_grad()
    def forward_hook(module: nn.Module, inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
        query, key, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        hook(attention.q_norm(query), attention.k_norm(key), attention.scale)

    return forward_hook
