"""Learning rates, weight decay, clipping, and the sum that a training step minimises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svip.config import Config, OptimConfig, load_config
from svip.models.svip import SVIP
from svip.training.loop import train_step
from svip.training.optim import build_optimizer, rate_factor, set_rates

SEEN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 0])
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tiny(*overrides: str) -> tuple[Config, SVIP]:
    shape = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
    config = load_config("smoke", [shape, "model.selected_groups=2", "model.hidden=8", *overrides])
    torch.manual_seed(0)
    return config, SVIP(config.model, 16, torch.ones(5, 3))


def test_step_schedule_falls_to_four_fifths_every_five_epochs() -> None:
    config = OptimConfig(epochs=30, schedule="step")
    factors = [rate_factor(config, epoch * 10 + 9, steps_per_epoch=10) for epoch in (0, 4, 5, 9, 10, 29)]
    assert factors == pytest.approx([1, 1, 0.8, 0.8, 0.64, 0.8**5])


def test_warm_up_rises_linearly_to_the_full_rate_and_cosine_falls_to_nothing() -> None:
    config = OptimConfig(epochs=10, schedule="cosine", warmup=0.1)  # 100 steps, 10 of them to warm up
    assert [rate_factor(config, step, 10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate_factor(config, 10, 10) == 1
    assert rate_factor(config, 55, 10) == pytest.approx(0.5)  # half of the remaining 90 steps
    assert rate_factor(config, 99, 10) == pytest.approx(0.5 * (1 - math.cos(math.pi / 90)))


def test_constant_schedule_is_constant() -> None:
    assert {rate_factor(OptimConfig(epochs=2, schedule="constant"), step, 3) for step in range(6)} == {1.0}


def test_backbone_and_heads_have_their_own_rates_and_only_matrices_decay() -> None:
    config, model = tiny("optim.lr=0.01", "optim.head_lr=0.02", "optim.weight_decay=0.3")
    optimizer = build_optimizer(model, config.optim)
    set_rates(optimizer, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == (0.005 if name.startswith("backbone.") else 0.01), name
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0), name
    assert seen == set(names.values())


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped_as_a_whole(clip: float) -> None:
    config, model = tiny(f"optim.clip_norm={clip}")
    train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert norm == pytest.approx(0.01, rel=1e-3) if clip else norm > 0.1


def test_the_first_step_of_adam_moves_each_weight_by_its_rate() -> None:
    config, model = tiny("optim.lr=0.001", "optim.head_lr=0.002", "optim.weight_decay=0", "optim.clip_norm=0")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        moved = (parameter - before[name]).abs()[parameter.grad.abs() > 1e-4]  # Adam's epsilon is felt below
        expected = 0.001 if name.startswith("backbone.") else 0.002
        assert torch.allclose(moved, torch.full_like(moved, expected), rtol=2e-3), name


def test_the_loss_is_eq_14s_sum_of_its_parts() -> None:
    config, model = tiny("loss.lambda1=2.5", "loss.lambda2=0.5", "model.sigma=7")
    with torch.no_grad():
        passes = model(IMAGES)

        def logits(attributes: Tensor) -> Tensor:
            return 7 * F.normalize(attributes, dim=1) @ F.normalize(SEEN, dim=1).T

        source, contextualized = logits(passes.source), logits(passes.contextualized)
        p, q = source.softmax(1), contextualized.softmax(1)
        jeffreys = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
        score = passes.patch_logits.sigmoid()
        target = passes.patch_targets
        patch = -(target * score.log() + (1 - target) * (1 - score).log()).mean()
        rows = torch.arange(4)
        classes = -(p[rows, TARGETS].log().mean() + q[rows, TARGETS].log().mean())
    values = train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
    expected: dict[str, Any] = {
        "loss_cls": float(classes),
        "loss_consistency": float(jeffreys),
        "loss_patch": float(patch),
        "loss": float(classes + 2.5 * jeffreys + 0.5 * patch),
    }
    assert values == pytest.approx(expected, rel=1e-3)
    assert values["loss_consistency"] > 1e-6
