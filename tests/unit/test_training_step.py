"""One training step: what it adds up in every variant, how far it moves each parameter, and what it refuses to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svip.config import Config, load_config
from svip.models.svip import SVIP
from svip.training.loop import train_step
from svip.training.optim import build_optimizer, set_rates

SEEN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 0])
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tiny(*overrides: str) -> tuple[Config, SVIP]:
    shape = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
    config = load_config("smoke", [shape, "model.selected_groups=2", "model.hidden=8", *overrides])
    torch.manual_seed(0)
    return config, SVIP(config.model, 16, torch.ones(5, 3))


def parameters(model: SVIP) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("model.contextualize=unselected", {"loss_cls", "loss_consistency", "loss_patch"}),
        ("model.contextualize=drop", {"loss_cls", "loss_consistency", "loss_patch"}),
        ("model.contextualize=all", {"loss_cls", "loss_consistency"}),  # selects nothing
        ("model.contextualize=none", {"loss_cls", "loss_patch"}),  # one pass: nothing to be consistent with
    ],
)
def test_each_variant_sums_the_parts_that_it_has(variant: str, parts: set[str]) -> None:
    config, model = tiny(variant, "loss.lambda1=2.5", "loss.lambda2=0.5")
    values = train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
    assert values.keys() == {"loss", *parts}
    weights = {"loss_cls": 1.0, "loss_consistency": 2.5, "loss_patch": 0.5}
    assert values["loss"] == pytest.approx(sum(weights[name] * values[name] for name in parts), rel=1e-5)


def test_the_baseline_is_the_cross_entropy_of_one_pass() -> None:
    config, model = tiny("model.contextualize=none", "model.readout=cls", "model.sigma=7")
    with torch.no_grad():
        cosines = F.normalize(model(IMAGES).source, dim=1) @ F.normalize(SEEN, dim=1).T
    expected = -(7 * cosines).softmax(1)[torch.arange(4), TARGETS].log().mean()
    values = train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
    assert values == pytest.approx({"loss": float(expected), "loss_cls": float(expected)}, rel=1e-5)


def test_weight_decay_shrinks_matrices_by_rate_times_decay_and_nothing_else() -> None:
    moved = []
    for decay in (0.0, 0.5):
        config, model = tiny(f"optim.weight_decay={decay}", "optim.lr=0.01", "optim.head_lr=0.02")
        before = parameters(model)
        train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)
        moved.append(parameters(model))
    for name, plain in moved[0].items():
        rate = 0.01 if name.startswith("backbone.") else 0.02
        shrunk = plain - rate * 0.5 * before[name] if plain.ndim > 1 else plain
        assert torch.allclose(moved[1][name], shrunk, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(broken: str, clip: float) -> None:
    config, model = tiny(f"optim.clip_norm={clip}", "optim.weight_decay=0.1")
    optimizer = build_optimizer(model, config.optim)
    train_step(model, optimizer, config, IMAGES, TARGETS, SEEN)  # now the optimiser has a state to be spoilt
    assert model.patch_classifier is not None
    first, _, last = model.patch_classifier
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        if broken == "loss":
            last.bias.fill_(math.inf)
        else:  # logits near 1e36 have a finite loss, while its derivatives go beyond 1e38
            first.weight.mul_(1e-3)
            first.bias.fill_(1e-3)
            last.weight.fill_(3e38)
    before = parameters(model)
    moments = [tensor.clone() for entry in optimizer.state.values() for tensor in entry.values()]
    values = train_step(model, optimizer, config, IMAGES, TARGETS, SEEN)
    assert math.isfinite(values["loss"]) == (broken == "gradient")
    assert not math.isfinite(values[broken])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    after = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    assert all(torch.equal(one, two) for one, two in zip(moments, after, strict=True))


def test_no_gradient_of_an_earlier_step_leaks_into_the_next() -> None:
    config, model = tiny("optim.lr=0", "optim.head_lr=0", "optim.clip_norm=0")
    optimizer = build_optimizer(model, config.optim)
    gradients = []
    for _ in range(2):
        train_step(model, optimizer, config, IMAGES, TARGETS, SEEN)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_head_stage_leaves_the_backbone_as_it_is_even_with_weight_decay() -> None:
    config, model = tiny("optim.weight_decay=0.5")
    optimizer = build_optimizer(model, config.optim)
    before = parameters(model)
    for trainable in (False, True):
        model.backbone.set_trainable(trainable)
        train_step(model, optimizer, config, IMAGES, TARGETS, SEEN)
        same = {name for name, tensor in parameters(model).items() if torch.equal(tensor, before[name])}
        assert same == (set() if trainable else {name for name in before if name.startswith("backbone.")})


def test_bf16_gives_a_finite_loss_near_that_of_fp32_and_keeps_parameters_in_fp32() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        config, model = tiny(f"train.precision={precision}")
        losses.append(train_step(model, build_optimizer(model, config.optim), config, IMAGES, TARGETS, SEEN)["loss"])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1], "autocast is on"


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
