"""Training as a user meets it: killed at any moment and resumed, stopped by a bad loss, blind to the test images."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from small_training import ATTRIBUTES, IMAGE_ROLES, TINY, write_bundle

from svip.config import Config, load_config
from svip.data.bundle import ROLES, Bundle
from svip.training import checkpoint, loop

STEPS = 5  # of an epoch of the select phase: 4 train classes with 5 images each, 4 a batch


def config_with(*overrides: str) -> Config:
    return load_config("smoke", [*TINY, *overrides])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("data") / "bundle", IMAGE_ROLES)


@pytest.fixture(scope="module")
def words() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)


def train(config: Config, bundle: Bundle, words: NDArray[np.float32], out: Path) -> dict[str, Any]:
    return loop.train(config, bundle, words, out, lambda *_: None)


def killed(prepare: Callable[[], None], *arguments: Any) -> None:
    """Train in a process of its own, in which ``prepare`` arranged for a SIGKILL."""

    def target() -> None:
        prepare()
        train(*arguments)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def at_step(number: int) -> Callable[[], None]:
    """Die in the training step of that number, counted from 1 over the life of the process."""

    def prepare() -> None:
        step, count = loop.train_step, iter(range(1, 1000))

        def dying_step(*arguments: Any) -> dict[str, float]:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)

        loop.train_step = dying_step  # type: ignore[assignment]

    return prepare


def while_writing(number: int) -> Callable[[], None]:
    """Die when half of the checkpoint of that number is on disk."""

    def prepare() -> None:
        save, count = torch.save, iter(range(1, 1000))

        def dying_save(state: Any, path: Path) -> None:
            save(state, path)
            if next(count) == number:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = dying_save  # type: ignore[assignment]

    return prepare


def outcome(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Everything that training decided: model.json and history.json but for the time it took, and the weights."""
    info = json.loads((out / "model.json").read_text())
    history = json.loads((out / "history.json").read_text())
    for entry in (info, *history):
        del entry["seconds"]
    return info, history, load_file(out / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    info, history, weights = outcome(one)
    other_info, other_history, other_weights = outcome(other)
    assert (info, history) == (other_info, other_history)
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.view(torch.uint8), other_weights[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def uninterrupted(bundle: Bundle, words: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "whole"
    train(config_with(), bundle, words, out)
    return out


@pytest.mark.parametrize("told_before", [False, True])
def test_an_epoch_is_told_whenever_the_process_ended_and_counts_once(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, told_before: bool
) -> None:
    told: list[tuple[str, int, int, str]] = []
    saved = iter(range(1, 1000))

    def tell(metrics: dict[str, float], epoch: int, phase: str, ended: int) -> None:
        told.append((phase, epoch, ended, repr(metrics)))
        if told_before and len(told) == 2:
            raise KeyboardInterrupt

    def lost() -> None:
        if not told_before and next(saved) == 2:  # between an epoch's checkpoint and its report
            raise KeyboardInterrupt

    config = config_with("optim.epochs=3", "train.checkpoint_steps=0")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, bundle, words, tmp_path / "run", tell, lost)
    assert len(told) == (2 if told_before else 1)
    loop.train(config, bundle, words, tmp_path / "run", tell)
    select = [entry for entry in told if entry[0] == "select"]
    assert len(select) == (4 if told_before else 3)
    assert [epoch for _, epoch, *_ in sorted(set(select))] == [1, 2, 3]


@pytest.mark.parametrize("steps_between", [0, 2])
@pytest.mark.parametrize(
    "deaths",
    [
        [at_step(1)],
        [at_step(STEPS + 4)],  # in mid-epoch
        [at_step(2 * STEPS + 1)],  # right after an epoch's checkpoint
        [at_step(3 * STEPS + 4)],  # in the final phase
        [while_writing(1)],
        [while_writing(4)],
        [at_step(4), while_writing(2), at_step(STEPS)],  # again and again
    ],
    ids=["at once", "mid-epoch", "between epochs", "final phase", "first write", "a later write", "three times"],
)
def test_a_killed_training_resumes_bit_for_bit(
    bundle: Bundle,
    words: NDArray[np.float32],
    uninterrupted: Path,
    tmp_path: Path,
    deaths: list[Callable[[], None]],
    steps_between: int,
) -> None:
    config = config_with(f"train.checkpoint_steps={steps_between}")
    for death in deaths:
        killed(death, config, bundle, words, tmp_path / "run")
    train(config, bundle, words, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted)
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {
        *("bundle.sha256", "classes.parquet", "config.yaml", "history.json"),
        *("model.json", "model.safetensors", "best.safetensors"),
    }


def test_mid_epoch_checkpoints_are_used(bundle: Bundle, words: NDArray[np.float32], tmp_path: Path) -> None:
    config = config_with("train.checkpoint_steps=2")
    killed(at_step(STEPS), config, bundle, words, tmp_path / "run")
    state = torch.load(tmp_path / "run/select/state.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (0, 4)


def test_dropout_and_loader_processes_resume_bit_for_bit_too(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path
) -> None:
    dropping = ["train.checkpoint_steps=2", "model.backbone_args.drop_path_rate=0.5"]
    train(config_with(*dropping), bundle, words, tmp_path / "whole")
    config = config_with(*dropping, "train.workers=2")
    killed(at_step(STEPS + 4), config, bundle, words, tmp_path / "run")
    train(config, bundle, words, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_training_is_left_as_it_is(
    bundle: Bundle, words: NDArray[np.float32], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")}
    monkeypatch.delattr(loop, "train_step")
    info = train(config_with(), bundle, words, uninterrupted)
    assert info == json.loads((uninterrupted / "model.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")}


def test_another_configuration_is_refused_with_what_differs(
    bundle: Bundle, words: NDArray[np.float32], uninterrupted: Path
) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.5.*another --out"):
        train(config_with("optim.lr=0.5"), bundle, words, uninterrupted)
    train(config_with("train.workers=1", "evaluation.batch_size=3"), bundle, words, uninterrupted)  # don't matter


def test_another_bundle_is_refused(
    bundle: Bundle, words: NDArray[np.float32], uninterrupted: Path, tmp_path: Path
) -> None:
    other = Bundle(bundle.path, {**bundle.info, "sha256": "f" * 64}, bundle.split, bundle.classes)
    with pytest.raises(checkpoint.CheckpointError, match="another bundle .*ffffffffffff"):
        train(config_with(), other, words, uninterrupted)


@pytest.mark.parametrize("damage", ["half", "code"])
def test_a_damaged_or_foreign_checkpoint_is_named_and_runs_no_code(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, damage: str
) -> None:
    killed(at_step(STEPS + 1), config_with(), bundle, words, tmp_path / "run")
    state = tmp_path / "run/select/state.pt"
    if damage == "half":
        os.truncate(state, state.stat().st_size // 2)
    else:
        torch.save({"model": Touches(str(tmp_path / "touched"))}, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt can't be resumed from"):
        train(config_with(), bundle, words, tmp_path / "run")
    assert not (tmp_path / "touched").exists()


class Touches:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.train_step
    seen: list[Any] = []

    def step_with_infinity(model: Any, *arguments: Any) -> dict[str, float]:
        if len(seen) == STEPS + 2:
            with torch.no_grad():
                model.patch_head.bias[0] = float("inf")
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            values = step(model, *arguments)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            return values
        seen.append(arguments[2])
        return step(model, *arguments)

    monkeypatch.setattr(loop, "train_step", step_with_infinity)
    with pytest.raises(loop.NonFiniteLoss, match=r"phase select, epoch 2, step 3; its images: \d/\d.png, .*Lower the"):
        train(config_with(), bundle, words, tmp_path / "run")
    state = torch.load(tmp_path / "run/select/state.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (1, 0)


def test_test_images_are_never_read_and_unseen_classes_never_trained_on(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    classes: set[tuple[float, ...]] = set()
    image, step = Bundle.image, loop.train_step

    def watching_image(self: Bundle, row: int) -> NDArray[np.uint8]:
        read.add(row)
        return image(self, row)

    def watching_step(*arguments: Any) -> dict[str, float]:
        classes.update(map(tuple, arguments[5].tolist()))
        return step(*arguments)

    monkeypatch.setattr(Bundle, "image", watching_image)
    monkeypatch.setattr(loop, "train_step", watching_step)
    train(config_with("model.head_init=probe"), bundle, words, tmp_path / "run")
    roles = {role for role in ROLES if read & set(bundle.rows(role).tolist())}
    assert roles == {"train", "val_seen", "val_unseen"}
    assert classes == set(map(tuple, bundle.class_attributes[:6].tolist()))


def test_the_epoch_of_the_best_validation_h_is_trained_again_on_trainval(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(10.0, 0.1), (30.0, 0.3), (20.0, 0.2)])

    def validate(*_: Any) -> dict[str, float]:
        harmonic, gamma = next(answers)
        return {"T1": 50.0, "U": harmonic, "S": harmonic, "H": harmonic, "gamma": gamma}

    steps: list[int] = []
    step = loop.train_step

    def counting_step(*arguments: Any) -> dict[str, float]:
        steps.append(len(arguments[4]))
        return step(*arguments)

    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr(loop, "train_step", counting_step)
    info = train(config_with(), bundle, words, tmp_path / "run")
    assert (info["epochs"], info["gamma"], info["validation"]["H"]) == (2, 0.3, 30.0)
    # 3 epochs of 20 train images, then 2 of all 30 trainval images
    assert (sum(steps[: 3 * STEPS]), sum(steps[3 * STEPS :])) == (60, 60)


def test_without_selection_all_epochs_are_trained_and_no_gamma_is_claimed(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path
) -> None:
    info = train(config_with("train.select=false"), bundle, words, tmp_path / "run")
    assert (info["epochs"], info["gamma"], info["validation"]) == (3, None, None)
    assert not (tmp_path / "run/select").exists()


def test_the_head_stage_and_frozen_blocks_leave_the_backbone_alone(
    bundle: Bundle, words: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    finish = loop._finish_epoch

    def recording(phase: Any, config: Any, bundle: Any, model: Any, progress: Any) -> dict[str, Any]:
        states.append({name: tensor.clone() for name, tensor in model.backbone.vit.state_dict().items()})
        return finish(phase, config, bundle, model, progress)

    monkeypatch.setattr(loop, "_finish_epoch", recording)
    config = config_with("optim.head_epochs=2", "model.frozen_blocks=1", "train.select=false")
    train(config, bundle, words, tmp_path / "run")
    first, second, third = states
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    changed = {name for name, tensor in second.items() if not torch.equal(tensor, third[name])}
    assert changed and all(name.startswith(("blocks.1.", "norm.")) for name in changed)


def test_bf16_trains_with_parameters_in_fp32(bundle: Bundle, words: NDArray[np.float32], tmp_path: Path) -> None:
    train(config_with("train.precision=bf16", "optim.epochs=1"), bundle, words, tmp_path / "run")
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert all(np.isfinite(entry["train/loss"]) for entry in history)
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model.safetensors").values()} == {torch.float32}
