"""Files that are whole or not there, states that come back to the bit, and errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from svip.config import Config, load_config
from svip.models.svip import SVIP
from svip.training import checkpoint
from svip.training.checkpoint import CheckpointError, load_model, load_state, save_model, save_state, write_atomically
from svip.training.distributed import rng_state
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0])
SEEN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
PROGRESS = {"epoch": 2, "batch": 1, "sums": {"loss": 0.1 + 0.2}, "history": [{"phase": "select", "val/H": 1 / 3}]}


def tiny(*overrides: str) -> tuple[Config, SVIP, AdamW]:
    """A model whose parameters differ in every call."""
    shape = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
    size = ["data.image_size=16", "model.selected_groups=2", "model.hidden=8"]
    config = load_config("smoke", [shape, *size, *overrides])
    model = SVIP(config.model, 16, torch.randn(5, 3))
    return config, model, build_optimizer(model, config.optim)


def saved(path: Path) -> tuple[Config, SVIP, AdamW]:
    """A model after two steps, with its state at ``path``."""
    config, model, optimizer = tiny()
    for _ in range(2):
        train_step(model, optimizer, config, IMAGES, TARGETS, SEEN)
    save_state(path, model, optimizer, PROGRESS, [rng_state()])
    return config, model, optimizer


def moments(optimizer: AdamW) -> list[Tensor]:
    return [tensor for entry in optimizer.state.values() for tensor in entry.values()]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old", "a reader must never see a part"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"file": "old"}


def test_what_a_killed_writer_left_is_overwritten_by_the_next_process(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:  # dies without any clean-up, as by SIGKILL
        try:
            write_atomically(tmp_path / "file", lambda temporary: (temporary.write_text("a longer half"), os._exit(9)))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 1, "the half-written file"
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("whole"))
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"file": "whole"}


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(path.exists()))
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert synced == [False]


def test_a_state_restores_model_optimizer_random_numbers_and_progress(tmp_path: Path) -> None:
    config, model, optimizer = saved(tmp_path / "state.pt")
    drawn = torch.rand(3)
    _, other, other_optimizer = tiny()  # other parameters, and the generator moves on
    assert load_state(tmp_path / "state.pt", other, other_optimizer) == PROGRESS
    assert torch.equal(torch.rand(3), drawn)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert len(moments(optimizer)) == len(moments(other_optimizer)) > 0
    for one, two in zip(moments(optimizer), moments(other_optimizer), strict=True):
        assert torch.equal(one, two)
    # what counts in the end: the next step is the same
    for trained, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        train_step(trained, its_optimizer, config, IMAGES, TARGETS, SEEN)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


class Touches:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "code", "model", "optimizer", "generators", "progress"])
def test_a_damaged_state_is_named_and_none_of_its_code_runs(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    _, model, optimizer = saved(path)
    if damage in ("empty", "half"):
        os.truncate(path, path.stat().st_size // 2 if damage == "half" else 0)
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        content = torch.load(path, weights_only=True)
        if damage == "code":
            content["progress"] = Touches(tmp_path / "touched")
        else:
            del content[damage]
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"/state\.pt can't be resumed from .*delete it, or use another --out"):
        load_state(path, model, optimizer)
    assert not (tmp_path / "touched").exists()


def test_a_state_of_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "state.pt")
    _, wider, optimizer = tiny("model.hidden=9")
    with pytest.raises(CheckpointError, match=r"state\.pt can't be resumed from"):
        load_state(tmp_path / "state.pt", wider, optimizer)


def test_a_saved_model_predicts_the_same_when_loaded(tmp_path: Path) -> None:
    config, model, _ = tiny("model.contextualize=drop", "data.flip=true")
    save_model(tmp_path, model.eval(), config, {"attributes": 5, "gamma": 0.25})
    loaded, its_config, info = load_model(tmp_path)
    assert not loaded.training
    assert its_config == config
    assert (info["attributes"], info["gamma"]) == (5, 0.25)
    one, two = model.predict(IMAGES), loaded.predict(IMAGES)
    assert torch.equal(one.attributes, two.attributes)
    assert torch.equal(one.selected, two.selected)


def test_loading_needs_no_pretrained_weights_and_no_word_vectors(tmp_path: Path) -> None:
    config, model, _ = tiny("model.context=random")
    config.model.weights = str(tmp_path / "long gone.safetensors")
    save_model(tmp_path, model, config, {"attributes": 5})
    loaded, _, _ = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_model_json_comes_last_so_that_it_stands_for_a_finished_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, _ = tiny()
    written: list[str] = []
    replace = Path.replace

    def recording(self: Path, target: Path) -> Path:
        written.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    save_model(tmp_path, model, config, {"attributes": 5})
    assert sorted(written) == ["config.yaml", "model.json", "model.safetensors"]
    assert written[-1] == "model.json"


def test_loading_says_what_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no finished training"):
        load_model(tmp_path)
    config, model, _ = tiny()
    save_model(tmp_path, model, config, {"attributes": 5})
    checkpoint.save_weights(tmp_path / "model.safetensors", tiny("model.hidden=9")[1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit the configuration beside it"):
        load_model(tmp_path)


def with_state(folder: Path) -> Path:
    (folder / "select").mkdir()
    (folder / "select" / "state.pt").touch()
    return folder


def test_every_key_that_differs_is_named_and_only_those(tmp_path: Path) -> None:
    before = load_config("smoke", ["optim.epochs=5", "train.seed=3"])
    other = load_config("smoke", ["optim.epochs=6", "model.sigma=9"])
    assert not checkpoint.check_resumable(tmp_path, before), "nothing there yet"
    checkpoint.write_config(tmp_path, before)
    assert checkpoint.check_resumable(tmp_path, before)
    assert not checkpoint.check_resumable(tmp_path, other), "another one, which has left nothing to lose"
    with_state(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.check_resumable(tmp_path, other)
    message = str(refused.value)
    keys = message.split("configuration (")[1].split(");")[0]
    assert sorted(part.split(":")[0] for part in keys.split("; ")) == ["model.sigma", "optim.epochs", "train.seed"]
    assert "optim.epochs: 5 -> 6" in keys and "train.seed: 3 -> 0" in keys
    assert str(tmp_path) in message and "another --out" in message


@pytest.mark.parametrize(
    "change",
    [
        "train.device=cpu",
        "train.workers=3",
        "train.checkpoint_steps=7",
        "data.root=elsewhere",
        "data.mirror=web",
        "evaluation.eszsl=false",
    ],
)
def test_what_does_not_change_the_weights_may_change(tmp_path: Path, change: str) -> None:
    checkpoint.write_config(with_state(tmp_path), load_config("smoke"))
    assert checkpoint.check_resumable(tmp_path, load_config("smoke", [change]))


@pytest.mark.parametrize(
    "change", ["train.precision=bf16", "train.select=false", "data.seed=1", "semantics.pooling=sum"]
)
def test_what_changes_the_weights_may_not(tmp_path: Path, change: str) -> None:
    checkpoint.write_config(with_state(tmp_path), load_config("smoke"))
    with pytest.raises(CheckpointError, match=change.partition("=")[0].replace(".", r"\.")):
        checkpoint.check_resumable(tmp_path, load_config("smoke", [change]))
