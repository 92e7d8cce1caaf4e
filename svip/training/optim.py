"""The optimiser and its schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

from svip.config import OptimConfig
from svip.models.svip import SVIP


def build_optimizer(model: SVIP, config: OptimConfig) -> AdamW:
    """AdamW (Adam where weight_decay is 0) with one rate for the backbone and one for everything else.

    Only matrices decay. Frozen parameters are listed too: they receive no gradient and so are left alone.
    """
    groups = []
    for name, rate in (("backbone", config.lr), ("head", config.head_lr)):
        of_group = [p for key, p in model.named_parameters() if key.startswith("backbone.") == (name == "backbone")]
        for decay in (True, False):
            parameters: list[nn.Parameter] = [p for p in of_group if (p.ndim >= 2) == decay]
            weight_decay = config.weight_decay if decay else 0.0
            groups.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": weight_decay})
    return AdamW(groups, betas=(config.beta1, config.beta2))


def rate_factor(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """What both learning rates are multiplied with in this step (counted from 0 over the whole run)."""
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "step":
        return float(0.8 ** (step // steps_per_epoch // 5))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return 1.0


def set_rates(optimizer: AdamW, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
