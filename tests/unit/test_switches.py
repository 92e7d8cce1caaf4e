"""Each switch between the paper and its published code, turned alone: what it changes, and that it changes no more.

The recorded numbers of both readings (golden.json, see ``record``) hold the whole of either in place.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svip.config import Config, flatten, load_config
from svip.models.svip import SVIP
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

GOLDEN = Path(__file__).with_name("golden.json")
SHAPE = (
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={patch_size: 4, embed_dim: 24, depth: 3, num_heads: 3}",
    "model.weights=none",
    "model.selected_groups=10",
    "model.hidden=8",
    "data.store_size=32",
    "data.image_size=32",
)
"""An 8x8 grid, so 16 groups."""
ATTRIBUTES, CLASSES, WORD_SIZE, BATCH = 6, 5, 7, 4
GROUPS = (torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5]))
PUBLISHED_ONLY = {  # switch of published/* -> what it changes of `outputs`
    "model.score=rollout": {"patch_targets", "loss_patch"},
    "model.grouping=raster": {"patch_targets", "loss_patch"},
    # the classifier then finds the others, so all that is read off its choice changes too
    "model.targets=unrelated": {
        *("patch_targets", "loss_patch", "selected", "source", "contextualized", "test"),
        *("loss_cls", "loss_consistency"),
    },
    "model.patch_gradient=true": set[str](),
    "model.training_mask=pseudo_labels": {"source", "contextualized", "loss_cls", "loss_consistency"},
    "model.layout=interleaved": {"contextualized", "test", "loss_cls", "loss_consistency"},
    "model.pooling=mean": {"source", "contextualized", "test", "loss_cls", "loss_consistency"},
    "model.pooled_contextualized=central": {"contextualized", "loss_cls", "loss_consistency"},
    "model.pooled_test=all": {"test"},
    "model.logits=dot": {"scores", "loss_cls", "loss_consistency"},
    "loss.consistency=kl": {"loss_consistency"},
    "loss.consistency_mean=elements": {"loss_consistency"},
    "loss.temperature=20": {"loss_consistency"},
    "loss.group_weight=0.5": {"loss_group"},
}
IN_TRAINING = {
    "optim.reshuffle",
    "optim.drop_last",
    "optim.renew_adam",
    "optim.head_stage",
    "train.published",
    "evaluation.protocols",
}
"""Switches of published/* that act beyond one step; test_training_switches.py turns them."""


def prepared(*overrides: str, preset: str = "paper/cub") -> tuple[Config, SVIP, Tensor, Tensor, Tensor]:
    """Configuration, model, images, targets and seen classes, with weights seeded by their names."""
    config = load_config(preset, [*SHAPE, *overrides])
    random = np.random.default_rng(5)
    model = SVIP(config.model, 32, torch.from_numpy(random.standard_normal((ATTRIBUTES, WORD_SIZE)).astype(np.float32)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values * 0.3 + ("norm" in name and name.endswith("weight"))))
    images = torch.from_numpy(random.integers(0, 256, (BATCH, 3, 32, 32), np.uint8))
    targets = torch.from_numpy(random.integers(0, CLASSES, BATCH))
    seen = torch.from_numpy(random.random((CLASSES, ATTRIBUTES)).astype(np.float32))
    return config, model, images, targets, seen


def outputs(*overrides: str, preset: str = "paper/cub") -> dict[str, Any]:
    """All that one step and one prediction give, before any weight has moved."""
    config, model, images, targets, seen = prepared(*overrides, preset=preset)
    with torch.no_grad():
        passes, prediction = model(images), model.predict(images)
    found: dict[str, Any] = {
        "source": passes.source,
        "contextualized": passes.contextualized,
        "patch_logits": passes.patch_logits,
        "patch_targets": passes.patch_targets,
        "selected": prediction.selected.float(),
        "test": prediction.attributes,
        "scores": model.class_scores(torch.ones(1, ATTRIBUTES), seen),
    }
    losses = train_step(model, build_optimizer(model, config.optim), config, images, targets, seen, GROUPS)
    del losses["loss"]  # changes with each of its parts
    return {name: value.tolist() for name, value in found.items()} | losses


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return outputs()


def differing(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    keys = one.keys() | two.keys()
    return {key for key in keys if key not in one or key not in two or not np.allclose(one[key], two[key], 1e-6, 1e-9)}


@pytest.mark.parametrize(("switch", "changes"), PUBLISHED_ONLY.items())
def test_a_switch_turned_alone_changes_what_it_says_and_nothing_else(
    switch: str, changes: set[str], paper: dict[str, Any]
) -> None:
    assert differing(paper, outputs(switch)) == changes


def test_every_switch_between_the_readings_is_tested() -> None:
    for name in ("cub", "awa2", "sun"):
        published, paper = flatten(load_config(f"published/{name}")), flatten(load_config(f"paper/{name}"))
        differ = {key for key, value in published.items() if value != paper[key]}
        tested = {switch.split("=")[0] for switch in PUBLISHED_ONLY} | IN_TRAINING
        assert differ == tested | {"semantics.pooling"}


def test_the_patch_loss_reaches_the_patch_embedding_only_where_it_is_let() -> None:
    def patch_gradient(*switch: str) -> dict[str, Tensor]:
        config, model, images, _, _ = prepared(*switch)
        passes = model(images)
        torch.nn.functional.binary_cross_entropy_with_logits(passes.patch_logits, passes.patch_targets).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    classifier = {f"patch_classifier.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert patch_gradient().keys() == classifier
    embedding = {f"backbone.vit.patch_embed.proj.{kind}" for kind in ("weight", "bias")}
    assert patch_gradient("model.patch_gradient=true").keys() == classifier | embedding


def test_the_group_loss_is_the_mean_norm_within_each_group() -> None:
    found = outputs("loss.group_weight=0.5")
    norms = [
        np.mean([np.hypot(a, b) for a, b, *_ in found["contextualized"]]),
        np.mean([np.sqrt(np.square(row[2:]).sum()) for row in found["contextualized"]]),
    ]
    assert found["loss_group"] == pytest.approx(np.mean(norms), rel=1e-5)


def test_the_published_consistency_is_a_tempered_one_sided_kl_over_all_elements() -> None:
    _, model, images, _, seen = prepared()
    with torch.no_grad():
        passes = model(images)
    sigma = load_config("paper/cub").model.sigma
    p, q = (
        (model.class_scores(attributes, seen).double() / sigma / 0.5).softmax(1)
        for attributes in (passes.source, passes.contextualized)
    )
    expected = 0.25 * (q * (q / p).log()).sum() / (BATCH * CLASSES)
    found = outputs("loss.consistency=kl", "loss.consistency_mean=elements", "loss.temperature=0.5")
    assert found["loss_consistency"] == pytest.approx(float(expected), rel=1e-3)


def test_central_groups_are_those_most_alike_to_the_mean_group() -> None:
    config, model, _, _, _ = prepared("model.pooled_contextualized=central", "model.pooling=mean")
    tokens = torch.randn(2, 65, 24, generator=torch.Generator().manual_seed(0))
    attributes, values = model.read(tokens, torch.ones(2, 16, dtype=torch.bool), "central")
    assert values is not None and model.patch_head is not None
    for image in range(2):
        groups = torch.stack([tokens[image, 1:][model.index[g]].flatten() for g in range(16)])
        likeness = [float(group @ groups.mean(0)) for group in groups]
        best = sorted(range(16), key=lambda g: -likeness[g])[:10]
        torch.testing.assert_close(attributes[image], model.patch_head(groups[best]).mean(0))


def record() -> dict[str, Any]:
    """What golden.json holds: both readings' outputs, and three steps of training.

    Rewritten by ``python tests/unit/test_switches.py``, which is right only as long as test_published_code.py passes.
    """
    recorded: dict[str, Any] = {}
    for preset in ("paper/cub", "published/cub"):
        config, model, images, targets, seen = prepared(preset=preset)
        optimizer = build_optimizer(model, config.optim)
        losses = [train_step(model, optimizer, config, images, targets, seen, GROUPS)["loss"] for _ in range(3)]
        recorded[preset] = outputs(preset=preset) | {"trajectory": losses}
    return recorded


def test_both_readings_give_the_recorded_numbers() -> None:
    stored, found = json.loads(GOLDEN.read_text()), record()
    assert stored.keys() == found.keys()
    for preset, values in stored.items():
        assert values.keys() == found[preset].keys()
        for name, expected in values.items():
            np.testing.assert_allclose(found[preset][name], expected, 1e-4, 1e-5, err_msg=f"{preset} {name}")


if __name__ == "__main__":
    rounded = json.loads(json.dumps(record()), parse_float=lambda number: float(f"{float(number):.7g}"))
    GOLDEN.write_text(json.dumps(rounded) + "\n")
