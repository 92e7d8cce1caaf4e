"""The published code's ways of training, each turned alone: order, last batch, Adam, and choosing on the test set."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from small_training import ATTRIBUTES, IMAGE_ROLES, TINY, write_bundle

from svip.config import ConfigError, load_config
from svip.data.bundle import Bundle
from svip.evaluation.evaluate import evaluate
from svip.models.svip import SVIP
from svip.training import loop
from svip.training.optim import build_optimizer

TRAINVAL_IMAGES = 4 * 6 + 2 * 3
ONE_PHASE = ("train.select=false", "optim.batch_size=8")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("data") / "bundle", IMAGE_ROLES)


@pytest.fixture(scope="module")
def words() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)


class Steps:
    """Watches every training step: what it was given, and how many steps Adam remembered before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.targets: list[list[int]] = []
        self.remembered: list[int] = []
        step = loop.train_step

        def watched(model: Any, optimizer: Any, config: Any, images: Any, targets: Any, *rest: Any) -> Any:
            self.targets.append(targets.tolist())
            self.remembered.append(max((int(state["step"]) for state in optimizer.state.values()), default=0))
            return step(model, optimizer, config, images, targets, *rest)

        monkeypatch.setattr(loop, "train_step", watched)


def train(bundle: Bundle, words: NDArray[np.float32], out: Path, *overrides: str) -> dict[str, Any]:
    return loop.train(load_config("smoke", [*TINY, *overrides]), bundle, words, out, lambda *_: None)


def test_without_reshuffling_each_epoch_has_the_mixed_order_of_the_first(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    train(bundle, words, tmp_path / "new", *ONE_PHASE, "optim.epochs=3")
    drawn = [sum(steps.targets[start : start + 4], []) for start in (0, 4, 8)]
    steps.targets.clear()
    train(bundle, words, tmp_path / "kept", *ONE_PHASE, "optim.epochs=3", "optim.reshuffle=false")
    kept = [sum(steps.targets[start : start + 4], []) for start in (0, 4, 8)]
    assert drawn[0] != drawn[1] != drawn[2] and sorted(drawn[0]) == sorted(drawn[1])
    assert kept == [drawn[0]] * 3 and kept[0] != sorted(kept[0])


def test_the_last_smaller_batch_can_be_left_out(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    train(bundle, words, tmp_path / "run", *ONE_PHASE, "optim.epochs=2", "optim.drop_last=true")
    assert [len(targets) for targets in steps.targets] == [8, 8, 8] * 2


def test_leaving_out_the_only_batch_is_refused(bundle: Bundle, words: NDArray[np.float32], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.drop_last=true leaves nothing of 30 training images"):
        train(bundle, words, tmp_path / "run", *ONE_PHASE, "optim.drop_last=true", "optim.batch_size=31")


def test_adam_is_renewed_in_each_epoch_after_the_head_only_ones(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    options = (*ONE_PHASE, "optim.epochs=4", "optim.head_epochs=2")
    train(bundle, words, tmp_path / "plain", *options)
    assert steps.remembered == list(range(16))
    steps.remembered.clear()
    train(bundle, words, tmp_path / "renewed", *options, "optim.renew_adam=true")
    assert steps.remembered == [*range(8), *range(4), *range(4)]


def test_piled_up_gradients_are_summed_and_never_applied(bundle: Bundle) -> None:
    config = load_config("smoke", [*TINY, "optim.head_stage=piled", "optim.clip_norm=0"])
    torch.manual_seed(0)
    model = SVIP(config.model, config.data.image_size, torch.ones(ATTRIBUTES, 7))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config.optim)
    seen, targets = torch.from_numpy(bundle.class_attributes[:4]), torch.tensor([0, 1, 2, 3])
    expected: dict[str, torch.Tensor] = {}
    for step in range(3):
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        single = copy.deepcopy(model)
        loop.train_step(single, build_optimizer(single, config.optim), config, images, targets, seen)
        for name, parameter in single.backbone.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + parameter.grad
        loop.train_step(model, optimizer, config, images, targets, seen, piles=True)
        for name, parameter in model.backbone.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name], msg=f"step {step}, {name}")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("backbone.")}


def test_piled_up_gradients_are_felt_through_clipping_alone(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path
) -> None:
    def weights(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        options = (*ONE_PHASE, "optim.epochs=2", "optim.head_epochs=2", *overrides)
        train(bundle, words, tmp_path / name, *options)
        return load_file(tmp_path / name / "model.safetensors")

    frozen, piled = (weights(stage, f"optim.head_stage={stage}") for stage in ("frozen", "piled"))
    differ = {name for name, tensor in frozen.items() if not torch.equal(tensor, piled[name])}
    assert differ and not any(name.startswith("backbone.") for name in differ)
    free = [weights(f"free-{s}", f"optim.head_stage={s}", "optim.clip_norm=0") for s in ("frozen", "piled")]
    assert all(torch.equal(tensor, free[1][name]) for name, tensor in free[0].items())


def test_following_the_published_protocol_leaves_the_honest_model_as_it_is(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path
) -> None:
    # the learning rates are such that the first epoch is chosen, so that the published protocol goes on for longer
    options = ("optim.epochs=4", "optim.lr=0.3", "optim.head_lr=0.3", "train.seed=1", "optim.schedule=constant")
    honest = train(bundle, words, tmp_path / "honest", *options)
    both = train(bundle, words, tmp_path / "both", *options, "train.published=true")
    assert honest["epochs"] < 4
    assert both["published"] is not None and honest["published"] is None
    assert {**both, "published": None, "seconds": 0} == {**honest, "seconds": 0}
    weights = load_file(tmp_path / "honest" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "both" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    assert sorted(path.name for path in (tmp_path / "both" / "final").iterdir()) == []

    history = json.loads((tmp_path / "both" / "history.json").read_text())
    tested = {entry["epoch"]: entry["published/H"] for entry in history if "published/H" in entry}
    assert list(tested) == [1, 2, 3, 4]
    assert both["published"]["H"] == max(tested.values()) == tested[both["published"]["epoch"]]


def test_evaluation_shows_the_published_numbers_beside_the_honest_ones(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path
) -> None:
    protocols = "evaluation.protocols=[validation,none,oracle,published]"
    info = train(bundle, words, tmp_path / "run", protocols, "train.published=true", "evaluation.eszsl=false")
    metrics = evaluate(tmp_path / "run", bundle, tmp_path / "test")
    assert metrics["protocols"]["published"] == info["published"]
    assert metrics["protocols"]["validation"]["gamma"] == info["gamma"]
    # one model alone has no epoch to choose
    train(bundle, words, tmp_path / "alone", protocols, "evaluation.eszsl=false")
    alone = evaluate(tmp_path / "alone", bundle, tmp_path / "test-alone")["protocols"]
    assert "epoch" not in alone["published"] and alone["published"].keys() == alone["oracle"].keys()


@pytest.mark.parametrize("dies_in_epoch", [1, 2, 3])
def test_a_published_run_that_is_interrupted_goes_on_bit_for_bit(
    dies_in_epoch: int, bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *("train.published=true", "optim.renew_adam=true", "optim.drop_last=true", "train.checkpoint_steps=1"),
        *("optim.head_epochs=2", "optim.head_stage=piled", "optim.clip_norm=0.1"),
    )
    whole = train(bundle, words, tmp_path / "whole", *options)
    finish, count = loop._finish_epoch, iter(range(1, 100))

    def dying(phase: Any, *arguments: Any) -> Any:
        if phase.name == "final" and next(count) == dies_in_epoch:
            raise KeyboardInterrupt
        return finish(phase, *arguments)

    monkeypatch.setattr(loop, "_finish_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        train(bundle, words, tmp_path / "resumed", *options)
    monkeypatch.undo()
    resumed = train(bundle, words, tmp_path / "resumed", *options)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "resumed" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
