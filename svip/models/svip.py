"""The two-pass model of the paper, and its ablations as switches of ``ModelConfig``.

Shapes: B images, N patch tokens, G = N/4 merged groups, D width, E = 4D merged width, A attributes, V word-vector
size, M selected groups, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svip.config import ConfigError, ModelConfig
from svip.models.backbone import Backbone
from svip.models.contextualization import FreeContext, WordsToPatch
from svip.models.patches import (
    AttentionRollout,
    AttentionScores,
    Scores,
    block_index,
    group_scores,
    merge,
    pseudo_labels,
    select,
    unmerge,
)


@dataclass
class Passes:
    """What a training step needs of both passes. Without contextualization there is no second pass."""

    source: Tensor
    """Attribute prediction of pass 1, [B, A]."""
    contextualized: Tensor | None
    """Attribute prediction of pass 2, [B, A]."""
    patch_logits: Tensor | None
    """The patch classifier's logits, [B, G]."""
    patch_targets: Tensor | None
    """Its pseudo-labels from pass 1's attention, in [0, 1], [B, G]: high where the logits should be."""


@dataclass
class Prediction:
    """One image batch at test time (a single pass)."""

    attributes: Tensor
    """Attribute prediction a_hat, [B, A]."""
    selected: Tensor
    """Selected groups S_M, bool [B, G]; all true for a model that selects none."""
    localization: Tensor | None
    """Each group's attribute values before pooling, [B, G, A]; None when only the class token is read."""


class SVIP(nn.Module):
    """Images in (uint8 [B, 3, S, S]), attribute predictions out ([B, A])."""

    def __init__(self, config: ModelConfig, image_size: int, words: Tensor) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, image_size)
        width, attributes = self.backbone.width, words.shape[0]
        self.index: Tensor
        self.score_index: Tensor
        self.mean: Tensor
        self.std: Tensor
        try:
            self.register_buffer("index", block_index(self.backbone.grid), persistent=False)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        scored = self.index if config.grouping == "block" else torch.arange(self.index.numel()).view(-1, 4)
        self.register_buffer("score_index", scored, persistent=False)
        for name, values in zip(("mean", "std"), self.backbone.normalization, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)

        self.groups = len(self.index)
        self.group_grid = (self.backbone.grid[0] // 2, self.backbone.grid[1] // 2)
        self.two_passes = config.contextualize != "none"
        # "all" contextualizes and reads every group, so there is nothing to select; the class token alone of a single
        # pass needs no patches at all
        self.selects = config.contextualize != "all" and (self.two_passes or config.readout != "cls")
        if self.selects and not 0 < config.selected_groups <= self.groups:
            raise ConfigError(
                f"model.selected_groups={config.selected_groups}: expected 1 to {self.groups}, the number of merged "
                f"groups of a {self.backbone.grid[0]}x{self.backbone.grid[1]} grid"
            )
        self.patch_classifier = (
            nn.Sequential(nn.Linear(4 * width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))
            if self.selects
            else None
        )
        self.context: WordsToPatch | FreeContext | None = None
        if config.contextualize in ("unselected", "all"):
            self.context = WordsToPatch(words, width, config.layout) if config.context == "w2p" else FreeContext(width)
            if config.context_init == "zero":
                self.context.zero()
        self.patch_head = nn.Linear(4 * width, attributes) if config.readout != "cls" else None
        self.class_head = nn.Linear(width, attributes) if config.readout != "p2a" else None

    def forward(self, images: Tensor) -> Passes:
        """Both passes of a training step (Sec. 3.3-3.5)."""
        patches = self.backbone.embed(self.normalize(images))  # [B, N, D]
        logits, selected = self.select_patches(patches)
        targets = None
        if logits is None:
            tokens = self.backbone.encode(patches)
        else:
            attention = self.attention_scores()
            tokens = self.backbone.encode(patches, hook=attention)
            scores = group_scores(attention, self.backbone.prefix, self.score_index)  # [B, G]
            best = select(scores, self.config.selected_groups)
            targets = pseudo_labels(scores) if self.config.targets == "minmax" else (~best).float()
            selected = selected if self.config.training_mask == "classifier" else best
        source, _ = self.read(tokens, selected)
        contextualized = None
        if self.two_passes:
            pooled = self.config.pooled_contextualized if self.selects else "selected"
            contextualized, _ = self.read(*self.encode_contextualized(patches, selected), pooled)
        return Passes(source, contextualized, logits, targets)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """One contextualized pass; the patch classifier alone selects the patches ("Zero-Shot Inference")."""
        patches = self.backbone.embed(self.normalize(images))
        _, selected = self.select_patches(patches)
        tokens, shown = self.encode_contextualized(patches, selected)
        attributes, localization = self.read(tokens, shown, self.config.pooled_test)
        return Prediction(attributes, selected, localization)

    def class_scores(self, attributes: Tensor, class_attributes: Tensor) -> Tensor:
        """Eq. 11's logits: sigma times the cosine of a_hat [B, A] and each class's attributes [C, A] -> [B, C].

        With ``logits: dot`` the length of a_hat counts too.
        """
        cosine = self.config.logits == "cosine"
        predicted = F.normalize(attributes.float(), dim=-1) if cosine else attributes.float()
        return self.config.sigma * predicted @ F.normalize(class_attributes.float(), dim=-1).T

    def attention_scores(self) -> Scores:
        """A fresh hook for ``Backbone.encode`` that scores tokens by the attention of all layers."""
        return AttentionScores() if self.config.score == "eq4" else AttentionRollout()

    def normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def select_patches(self, patches: Tensor) -> tuple[Tensor | None, Tensor]:
        """Eqs. 5 and 8: the classifier's logits [B, G] on the raw patches [B, N, D], and the selected groups [B, G].

        Only with ``patch_gradient`` does the classifier's loss train the patch embedding too.
        """
        if self.patch_classifier is None:
            return None, patches.new_ones(len(patches), self.groups, dtype=torch.bool)
        read = patches if self.config.patch_gradient else patches.detach()
        logits = self.patch_classifier(merge(read, self.index)).squeeze(-1).float()
        related = -logits if self.config.targets == "unrelated" else logits
        return logits, select(related.detach(), self.config.selected_groups)

    def encode_contextualized(self, patches: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Pass 2: final tokens, and the mask of the selected groups among the groups that are left in them."""
        # where every group is selected none is dropped, and the tokens stay in raster order
        if self.config.contextualize == "drop" and self.config.selected_groups < self.groups:
            kept = selected.nonzero()[:, 1].view(len(selected), -1)  # [B, M], ascending
            tokens = self.backbone.encode(patches, keep=self.index[kept].flatten(1))
            return tokens, torch.ones_like(kept, dtype=torch.bool)
        if self.context is not None:
            chosen = torch.ones_like(selected) if self.config.contextualize == "all" else ~selected
            e = self.context().to(patches.dtype).flatten()  # [E]
            added = chosen.unsqueeze(-1) * e  # Eq. 9, [B, G, E]
            patches = patches + unmerge(added, self.index)
        return self.backbone.encode(patches), selected

    def read(self, tokens: Tensor, selected: Tensor, pooled: str = "selected") -> tuple[Tensor, Tensor | None]:
        """Sec. 3.5: final tokens [B, T, D] -> a_hat [B, A] (Eq. 10), and the values of all groups [B, G, A].

        ``pooled``: selected (bool [B, G]), central (the M groups most alike to their mean) or all groups.
        """
        attributes = torch.zeros((), device=tokens.device)
        localization = None
        if self.patch_head is not None:
            groups = self.final_groups(tokens)
            localization = self.patch_head(groups)  # [B, G, A]
            if pooled == "central":
                alike = (groups @ groups.mean(1).unsqueeze(-1)).squeeze(-1)  # [B, G]
                selected = select(alike.detach().float(), self.config.selected_groups)
            elif pooled == "all":
                selected = torch.ones_like(selected)
            attributes = attributes + pool(localization, selected, self.config.pooling)
        if self.class_head is not None:
            attributes = attributes + self.class_head(tokens[:, 0])
        return attributes.float(), localization

    def final_groups(self, tokens: Tensor) -> Tensor:
        """Final tokens [B, T, D] -> the merged groups that are left in them, [B, G, E]."""
        patches = tokens[:, self.backbone.prefix :]
        whole = patches.shape[1] == self.index.numel()
        return merge(patches, self.index) if whole else patches.unflatten(1, (-1, 4)).flatten(2)


def pool(values: Tensor, selected: Tensor, how: str) -> Tensor:
    """Max (Eq. 10) or mean over the selected groups: [B, G, A] and bool [B, G] -> [B, A]."""
    mask = selected.unsqueeze(-1)
    if how == "max":
        return values.masked_fill(~mask, float("-inf")).amax(1)
    return (values * mask).sum(1) / mask.sum(1)
