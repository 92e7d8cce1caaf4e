"""Checkpoints: what is needed to go on bit for bit, and what is needed to use a trained model.

Every file is written under a temporary name, flushed to disk and renamed, so that whatever is killed, and whenever,
the last whole one is there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch.optim import Optimizer

from svip.changes import NOT_OF_TRAINING
from svip.config import Config, flatten, from_yaml, to_yaml
from svip.models.contextualization import WordsToPatch
from svip.models.svip import SVIP
from svip.training import distributed

AFTER_TRAINING = ("evaluation.", "train.device", "train.workers")
"""Beginnings of the keys that may be others when a checkpoint is evaluated: those that an evaluation looks at."""


GOES_ON_FROM = ("model.json", "final/state.pt", "select/history.json", "select/state.pt")
"""Files of which a training that can be gone on with has at least one."""


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and what to do."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, then give it that name.

    What a killed writer left half-written has that temporary name too, so the next one overwrites it.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_state(
    path: Path,
    model: SVIP,
    optimizer: Optimizer,
    progress: dict[str, Any],
    generators: Sequence[Mapping[str, torch.Tensor]],
    with_gradients: bool = False,
) -> None:
    """Everything that decides how training goes on; ``progress`` holds plain numbers, strings, lists and dicts.

    generators: ``distributed.rng_state`` of each process. ``with_gradients``: gradients too, where training adds to
    them.
    """
    state = {
        "gradients": {name: p.grad for name, p in model.named_parameters() if with_gradients and p.grad is not None},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": list(generators),
        "progress": progress,
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path, model: SVIP, optimizer: Optimizer) -> dict[str, Any]:
    """Restore ``save_state``'s file in place and return its progress. No code in the file is run.

    Rank 0 alone reads it. Processes that there were not when it was saved keep the generators that they have.
    """
    source = path if distributed.world() == 1 else io.BytesIO(distributed.on_main(path.read_bytes))
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, gradient in state.get("gradients", {}).items():
            parameter = model.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        for generators in state["generators"][distributed.rank() :][:1]:
            distributed.set_rng_state(generators)
        progress: dict[str, Any] = state["progress"]
    except Exception as error:  # torch raises many types for a damaged or foreign file
        raise CheckpointError(f"{path} can't be resumed from ({error!r}); delete it, or use another --out") from error
    return progress


def read_history(path: Path) -> list[dict[str, Any]]:
    """The epochs that ``save_state``'s file tells of; nothing else of it is read."""
    history: list[dict[str, Any]] = torch.load(path, mmap=True, weights_only=True)["progress"]["history"]
    return history


def save_weights(path: Path, model: SVIP) -> None:
    """The model alone, as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # not save_file, which makes a file that only its owner can read, whatever the umask
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors)))


def load_weights(path: Path, model: SVIP) -> None:
    """Put ``save_weights``'s file into a model of the same architecture."""
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise different types
        raise CheckpointError(f"{path} does not fit the configuration beside it: {error}") from error


def save_model(directory: Path, model: SVIP, config: Config, info: dict[str, Any]) -> None:
    """A trained model: model.safetensors, config.yaml (what ran) and, last, model.json."""
    save_weights(directory / "model.safetensors", model)
    write_config(directory, config)
    word_size = model.context.words.shape[1] if isinstance(model.context, WordsToPatch) else 1
    shape = {"attributes": info["attributes"], "word_size": word_size}
    write_json(directory / "model.json", info | shape)


def load_model(
    directory: Path, weights: str = "model.safetensors", overrides: Sequence[str] = ()
) -> tuple[SVIP, Config, dict[str, Any]]:
    """The model (on the CPU, in evaluation mode), its configuration (as ``read_config``), and model.json's content."""
    config = read_config(directory, overrides)
    info = read_info(directory)
    architecture = dataclasses.replace(config.model, weights="none")  # they are all in the checkpoint
    model = SVIP(architecture, config.data.image_size, torch.zeros(info["attributes"], info["word_size"]))
    load_weights(directory / weights, model)
    return model.eval(), config, info


def read_info(directory: Path) -> dict[str, Any]:
    """model.json's content; CheckpointError where training has not finished."""
    if not (directory / "model.json").is_file():
        raise CheckpointError(f"{directory} holds no finished training (no model.json); run `svip train --out` on it")
    return dict(json.loads((directory / "model.json").read_text(encoding="utf-8")))


def read_config(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a finished training, of which ``overrides`` may change how it is evaluated, and where.

    CheckpointError where there is none, or for another override.
    """
    for override in overrides:
        if not override.startswith(AFTER_TRAINING):
            raise CheckpointError(f"{override!r} can't change after training; only {', '.join(AFTER_TRAINING)} can")
    read_info(directory)  # config.yaml is there as soon as training begins
    return from_yaml(directory / "config.yaml", overrides)


def write_classes(directory: Path, classes: pd.DataFrame) -> None:
    """classes.parquet, as in the bundle: name, role, one float32 column an attribute."""
    write_atomically(directory / "classes.parquet", lambda temporary: classes.to_parquet(temporary, index=False))


def read_classes(directory: Path, attributes: int) -> pd.DataFrame:
    """The classes that a checkpoint was trained for; CheckpointError where they are not there or other ones."""
    path = directory / "classes.parquet"
    # trainings by older versions have none, nor do imported checkpoints of no known bundle
    classes = pd.read_parquet(path) if path.is_file() else None
    if classes is None or classes.shape[1] - 2 != attributes:
        raise CheckpointError(
            f"{path}: expected the checkpoint's classes with {attributes} attributes; copy the file out of the bundle "
            "that it was trained on"
        )
    return classes


def write_config(directory: Path, config: Config) -> None:
    write_text(directory / "config.yaml", to_yaml(config))


def can_go_on(directory: Path) -> bool:
    """Whether the folder holds a checkpoint; a training that ended before its first has left nothing to lose."""
    return any((directory / name).exists() for name in GOES_ON_FROM)


def goes_on(directory: Path) -> str:
    """Where a training that ``can_go_on`` does so, in words."""
    if (directory / "model.json").exists():
        return "with what follows the training"
    for phase in ("final", "select"):
        state = directory / phase / "state.pt"
        if state.exists():
            progress = torch.load(state, mmap=True, weights_only=True)["progress"]
            return f"in phase {phase} after epoch {progress['epoch']}, step {progress['batch']}"
    return "with phase final"


def check_resumable(directory: Path, config: Config) -> bool:
    """Whether this configuration was begun in the folder (the device and the like may differ).

    CheckpointError where another one was, and has left a checkpoint.
    """
    saved = directory / "config.yaml"
    if not saved.exists():
        return False
    before, now = flatten(from_yaml(saved)), flatten(config)
    compared = [key for key in now if not key.startswith(NOT_OF_TRAINING)]
    changed = [f"{key}: {before[key]} -> {now[key]}" for key in compared if before[key] != now[key]]
    if changed and can_go_on(directory):
        raise CheckpointError(
            f"{directory} was begun with another configuration ({'; '.join(changed)}); "
            "use the same one to resume, or another --out"
        )
    return not changed
