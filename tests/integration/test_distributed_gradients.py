"""Several processes take the step that one takes on the whole batch: gradients to 1e-6 of the largest one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from torch import Tensor

from svip.config import Config, load_config
from svip.models.svip import SVIP
from svip.training import distributed
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

CLASSES, ATTRIBUTES = 3, 6
GROUPS = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
PUBLISHED = [
    *("model.score=rollout", "model.grouping=raster", "model.targets=unrelated", "model.patch_gradient=true"),
    *("model.training_mask=pseudo_labels", "model.layout=interleaved", "model.pooling=mean"),
    *("model.pooled_contextualized=central", "model.pooled_test=all", "model.logits=dot"),
    *("loss.consistency=kl", "loss.consistency_mean=elements", "loss.temperature=20", "loss.group_weight=0.09"),
]
SWITCHES = {
    "paper": [],
    "published": PUBLISHED,
    "baseline": ["model.contextualize=none", "model.readout=cls"],
    "one pass": ["model.contextualize=none"],
    "dropped tokens": ["model.contextualize=drop"],
    "all contextualized": ["model.contextualize=all", "loss.consistency=jsd"],
    "free context": ["model.context=random", "model.readout=both"],
    "unweighted": ["loss.lambda1=0", "loss.lambda2=0"],
    "frozen blocks": [
        "model.frozen_blocks=1",
        "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    ],
}


def tiny(overrides: list[str]) -> tuple[Config, SVIP]:
    shape = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
    steady = ["model.selected_groups=2", "model.hidden=8", "optim.clip_norm=0", "optim.lr=0", "optim.head_lr=0"]
    config = load_config("smoke", [shape, *steady, *overrides])
    torch.manual_seed(0)
    return config, SVIP(config.model, 16, torch.randn(ATTRIBUTES, 3, generator=torch.Generator().manual_seed(3)))


def two_stages(overrides: list[str], images: int, piles: bool = False) -> tuple[list[dict[str, float]], list[Any]]:
    """The losses and gradients of a step with the backbone frozen (or piling up), and of two of the whole model.

    No step moves anything, since Adam makes large ones of the smallest differences.
    """
    config, model = tiny(overrides)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, CLASSES, (images,), generator=generator)
    seen = torch.rand(CLASSES, ATTRIBUTES, generator=generator)
    optimizer = build_optimizer(model, config.optim)
    own = batch[distributed.rank() :: distributed.world()]
    own_targets = targets[distributed.rank() :: distributed.world()]
    share = len(own) / images
    if not len(own):
        own, own_targets = batch[:1], targets[:1]
    losses, gradients = [], []
    for trainable in (False, True, True):
        piling = piles and not trainable
        model.backbone.set_trainable(trainable or piling)
        forward = distributed.parallel(model)
        step = (model, optimizer, config, own, own_targets, seen, GROUPS, piling, forward, share)
        losses.append(train_step(*step))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return losses, gradients


def assert_as_one(alone: tuple[list[dict[str, float]], list[Any]], ranks: list[Any]) -> None:
    for losses, gradients in ranks:
        assert losses == [pytest.approx(values, rel=1e-5, abs=1e-7) for values in alone[0]]
        for found, expected in zip(gradients, alone[1], strict=True):
            assert found.keys() == expected.keys()
            largest = max(float(gradient.abs().max()) for gradient in expected.values())
            for name, gradient in expected.items():
                assert torch.allclose(found[name], gradient, rtol=0, atol=1e-6 * largest), name


@pytest.mark.parametrize("switches", SWITCHES)
def test_two_processes_have_the_gradients_of_one_on_the_whole_batch(switches: str, tmp_path: Path) -> None:
    """Seven images: one has four of them, the other three."""
    alone = two_stages(SWITCHES[switches], 7)
    assert any(name.startswith("backbone.") for name in alone[1][1]) and not any(
        name.startswith("backbone.") for name in alone[1][0]
    )
    assert_as_one(alone, together(2, tmp_path, lambda: two_stages(SWITCHES[switches], 7)))


def test_gradients_that_pile_up_in_the_head_stage_are_summed_once(tmp_path: Path) -> None:
    alone = two_stages(PUBLISHED, 7, piles=True)
    assert_as_one(alone, together(2, tmp_path, lambda: two_stages(PUBLISHED, 7, piles=True)))


@pytest.mark.parametrize("images", [2, 3, 4])
def test_a_last_batch_smaller_than_the_number_of_processes_counts_each_image_once(images: int, tmp_path: Path) -> None:
    assert_as_one(two_stages([], images), together(3, tmp_path, lambda: two_stages([], images)))


def test_a_loss_that_one_process_alone_finds_infinite_is_not_finite_in_all_and_moves_nothing(tmp_path: Path) -> None:
    def step() -> tuple[dict[str, float], bool]:
        config, model = tiny([])
        forward = distributed.parallel(model)
        before: list[Tensor] = [parameter.detach().clone() for parameter in model.parameters()]
        images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        seen = torch.rand(CLASSES, ATTRIBUTES)
        if distributed.rank() == 1:
            seen[0, 0] = torch.inf
        targets = torch.tensor([0, 1])
        losses = train_step(
            model, build_optimizer(model, config.optim), config, images, targets, seen, (), False, forward, 0.5
        )
        return losses, all(map(torch.equal, before, model.parameters()))

    for losses, unmoved in together(2, tmp_path, step):
        assert not torch.tensor(losses["loss"]).isfinite()
        assert unmoved
