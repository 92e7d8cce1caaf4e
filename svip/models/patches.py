"""Patch geometry, scores and selection. B images, N patch tokens, G = N/4 merged groups of 2x2 tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def block_index(grid: tuple[int, int]) -> Tensor:
    """Raster numbers of the four tokens of each 2x2 block, int64 [G, 4] (top-left, -right, bottom-left, -right)."""
    height, width = grid
    if height % 2 or width % 2:
        raise ValueError(
            f"a {height}x{width} grid of patches does not part into 2x2 groups; choose data.image_size so that "
            "image size / patch size is even"
        )
    raster = torch.arange(height * width).view(height // 2, 2, width // 2, 2)
    return raster.transpose(1, 2).reshape(-1, 4)


def merge(tokens: Tensor, index: Tensor) -> Tensor:
    """Patch tokens [B, N, D] -> merged groups [B, G, 4D]."""
    return tokens[:, index.flatten()].unflatten(1, index.shape).flatten(2)


def unmerge(groups: Tensor, index: Tensor) -> Tensor:
    """Merged groups [B, G, 4D] -> patch tokens [B, N, D]; the exact inverse of ``merge``."""
    return groups.unflatten(2, (4, -1)).flatten(1, 2)[:, index.flatten().argsort()]


def attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of a block's queries [B, h, Q, d] to all its keys [B, h, T, d], float32 [B, h, Q, T]."""
    return ((query * scale) @ key.transpose(-2, -1)).float().softmax(-1)


def class_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The class token's row of it alone, mean over heads, [B, T]."""
    return attention(query[:, :, :1], key, scale).mean(1).squeeze(1)


class AttentionScores:
    """Scores each token by the attention that the class token gathers from it over all layers (Eq. 4).

    Eq. 4 is W^1 = T^1, W^l = W^{l-1} + W^{l-1} T^l with T^l the attention summed over h heads, and only the class
    token's row of W^L is needed: w <- (w + w T^l) / (1 + h), starting from w = T^1[cls] / h, is that row up to
    scale. It sums to one in every layer (the raw row reaches 1e13), costs O(N^2) a layer, and keeps no map.
    Call the object as a hook of ``Backbone.encode``; then read ``row`` [B, T], float32.
    """

    def __init__(self) -> None:
        self.row: Tensor | None = None

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, scale: float) -> None:
        heads = query.shape[1]
        if self.row is None:
            self.row = class_attention(query, key, scale)
            return
        weights = attention(query, key, scale)  # [B, h, T, T]
        with torch.autocast(query.device.type, enabled=False):  # it would take the row to bf16 in every layer
            step = (self.row[:, None, None] @ weights).sum((1, 2))  # [B, T]
        self.row = (self.row + step) / (1 + heads)


class AttentionRollout:
    """The published code's score: the class token's row of A^L .. A^1 with A^l = (mean over heads of T^l + I) / 2.

    As a row it is swept from the last layer to the first, w <- (w + w mean(T^l)) / 2, so the maps of all layers
    [B, T, T] are kept until it is read. Use it as ``AttentionScores``.
    """

    def __init__(self) -> None:
        self._maps: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self._maps.append(attention(query, key, scale).mean(1))

    @property
    def row(self) -> Tensor | None:
        """[B, T], float32."""
        if not self._maps:
            return None
        row = torch.zeros_like(self._maps[0][:, 0])
        row[:, 0] = 1
        with torch.autocast(row.device.type, enabled=False):
            for weights in reversed(self._maps):
                row = (row + (row[:, None] @ weights).squeeze(1)) / 2
        return row


Scores = AttentionScores | AttentionRollout


def group_scores(scores: Scores, prefix: int, index: Tensor) -> Tensor:
    """Mean score of each group's patch tokens, [B, G]; the ``prefix`` first tokens are not patches."""
    if scores.row is None:
        raise RuntimeError("no attention has been seen yet: pass the scores as hook of Backbone.encode")
    return scores.row[:, prefix:][:, index].mean(-1)


def pseudo_labels(scores: Tensor) -> Tensor:
    """Scores [B, G] scaled to [0, 1] in each image: the target of the patch classifier (Eq. 6), high = related.

    Neither the raw row (1e13) nor its normalised form (all near 1/N) is a usable target of a cross-entropy.
    """
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def select(scores: Tensor, count: int) -> Tensor:
    """Eq. 8: mask [B, G] of the ``count`` highest scores of each image (ties: the earlier group)."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
