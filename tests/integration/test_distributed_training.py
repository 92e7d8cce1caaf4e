"""Whole trainings in several processes: the same result, the same evaluation, and resumed by another number of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import together
from safetensors.torch import load_file
from small_training import ATTRIBUTES, IMAGE_ROLES, TINY, write_bundle

from svip.config import Config, ConfigError, load_config
from svip.data.bundle import Bundle
from svip.evaluation.evaluate import evaluate
from svip.training import distributed, loop
from svip.training.distributed import PeerFailed

SHAPE = [*TINY, "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"]
UNEVEN = [*SHAPE, "optim.batch_size=6", "optim.head_epochs=1", "optim.lr=1e-4", "optim.head_lr=1e-4"]
"""20 images of the select phase in batches of 6, 6, 6, 2: of the last one a third process gets none."""
DROPOUT = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, proj_drop_rate: 0.3}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("data") / "bundle", IMAGE_ROLES)


@pytest.fixture(scope="module")
def alone(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it; not to be changed."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(load_config("smoke", UNEVEN), bundle, out)
    evaluate(out, bundle, out / "evaluation")
    return out


def train(config: Config, bundle: Bundle, out: Path, saved: Callable[[], object] = lambda: None) -> dict[str, Any]:
    words = np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)
    return loop.train(config, bundle, words, out, lambda *_: None, saved)


def assert_close(one: Path, other: Path) -> None:
    """The same epoch and accuracies; losses and weights to single precision, which three epochs of Adam have stretched.

    Adam divides by the size of a gradient, and so makes much of a difference where it is almost nothing.
    """
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, other)]
    for found, expected in zip(*histories, strict=True):
        assert {k for k in found if k.startswith("val/")} == {k for k in expected if k.startswith("val/")}
        for name, value in expected.items():
            if name != "seconds":
                assert found[name] == (pytest.approx(value, rel=1e-3) if "/" in name else value), name
    infos = [json.loads((folder / "model.json").read_text()) for folder in (one, other)]
    assert infos[0]["epochs"] == infos[1]["epochs"]
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-4, name


@pytest.mark.parametrize("world", [2, 3])
def test_as_many_processes_as_you_like_train_and_evaluate_the_same_model(
    world: int, bundle: Bundle, alone: Path, tmp_path: Path
) -> None:
    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        info = train(load_config("smoke", UNEVEN), bundle, tmp_path / "run")
        return info, evaluate(alone, bundle, tmp_path / "evaluation")

    answers = together(world, tmp_path / "answers", work)
    assert_close(tmp_path / "run", alone)
    assert all(answer == answers[0] for answer in answers), "all know the same"
    files = {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()}
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert found == {name for name in files if not name.startswith("evaluation/")}
    # of one and the same checkpoint, not only the accuracies are the same
    expected = json.loads((alone / "evaluation" / "metrics.json").read_text())
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["protocols"] == expected["protocols"]
    tables = [np.load(folder / "evaluation" / "predictions.npz") for folder in (tmp_path, alone)]
    for name in ("rows", "labels", "selected"):
        assert np.array_equal(tables[0][name], tables[1][name]), name
    assert np.allclose(tables[0]["scores"], tables[1]["scores"], atol=1e-5)


class Stopped(Exception):
    """Raised where a test stops a training."""


def stop_after(checkpoints: int) -> Callable[[], None]:
    count = iter(range(1, 1000))

    def saved() -> None:
        if next(count) == checkpoints:
            raise Stopped

    return saved


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_a_training_goes_on_with_another_number_of_processes(
    before: int, after: int, bundle: Bundle, alone: Path, tmp_path: Path
) -> None:
    config = load_config("smoke", [*UNEVEN, "train.checkpoint_steps=3"])
    stop = stop_after(3)  # after step 3 of the second epoch
    if before == 1:
        with pytest.raises(Stopped):
            train(config, bundle, tmp_path / "run", stop)
    else:
        answers = together(before, tmp_path / "before", lambda: train(config, bundle, tmp_path / "run", stop))
        assert [type(answer) for answer in answers] == [Stopped, *[PeerFailed] * (before - 1)]
    progress = torch.load(tmp_path / "run" / "select" / "state.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["batch"]) == (1, 3)
    together(after, tmp_path / "after", lambda: train(config, bundle, tmp_path / "run"))
    assert_close(tmp_path / "run", alone)


@pytest.mark.parametrize("world", [2, 3])
def test_as_many_processes_as_before_go_on_bit_for_bit_even_with_dropout(
    world: int, bundle: Bundle, tmp_path: Path
) -> None:
    config = load_config("smoke", [*UNEVEN, DROPOUT, "train.select=false", "train.checkpoint_steps=3"])
    together(world, tmp_path / "whole", lambda: train(config, bundle, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "expected")
    shutil.rmtree(tmp_path / "run")
    for number, checkpoints in enumerate((1, 2, 2)):
        stopped = partial(train, config, bundle, tmp_path / "run", stop_after(checkpoints))
        together(world, tmp_path / str(number), stopped)
    together(world, tmp_path / "rest", lambda: train(config, bundle, tmp_path / "run"))
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "expected"))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_every_process_has_dropout_masks_of_its_own(tmp_path: Path) -> None:
    def mask() -> list[float]:
        torch.manual_seed(0)
        distributed.seed_dropout(0)
        return torch.rand(3).tolist()

    torch.manual_seed(0)
    masks = together(3, tmp_path, mask)
    assert len({tuple(mask) for mask in masks}) == 3
    assert masks[0] == torch.rand(3).tolist(), "the first one's are those of a process alone"


def test_an_error_of_rank_0_and_of_another_rank_end_all_at_once(bundle: Bundle, tmp_path: Path) -> None:
    def fail() -> None:
        if distributed.rank() == 1:
            raise ConfigError("of rank 1")
        distributed.broadcast(None)  # waits for all

    first, second, third = together(3, tmp_path, fail)
    assert isinstance(second, ConfigError)
    assert isinstance(first, PeerFailed) and isinstance(third, PeerFailed)


def test_a_loss_that_is_not_finite_ends_all_and_names_the_images_of_all(bundle: Bundle, tmp_path: Path) -> None:
    config = load_config("smoke", [*UNEVEN, "optim.lr=1e30", "optim.head_lr=1e30"])
    answers = together(2, tmp_path / "answers", lambda: train(config, bundle, tmp_path / "run"))
    assert {type(answer) for answer in answers} == {loop.NonFiniteLoss, PeerFailed}
    (message,) = (str(answer) for answer in answers if isinstance(answer, loop.NonFiniteLoss))
    assert message.count(".png") in (6, 2), "all images of the batch"


def test_a_batch_with_fewer_images_than_processes_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    config = load_config("smoke", [*UNEVEN, "optim.batch_size=1"])
    first, second = together(2, tmp_path / "answers", lambda: train(config, bundle, tmp_path / "run"))
    assert isinstance(first, ConfigError) and "an image a step for each of 2 processes" in str(first)
    assert isinstance(second, PeerFailed)


def test_who_records_the_training_knows_what_another_process_failed_with(tmp_path: Path) -> None:
    def work() -> None:
        with distributed.naming_the_failure():
            if distributed.rank() == 1:
                raise MemoryError("no memory for the batch")
            distributed.all_gather(0)

    first, second = together(2, tmp_path, work)
    assert isinstance(first, PeerFailed) and "failed with MemoryError('no memory for the batch')" in str(first)
    assert isinstance(second, MemoryError)
