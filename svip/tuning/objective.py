"""The objective: H on the validation classes at their gamma, and nothing of the test set, which an assertion holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svip.config import Config, ConfigError
from svip.data.bundle import TRAINVAL, Bundle, read_bundle
from svip.training import checkpoint, distributed
from svip.training.loop import Phase, run_phase

OBJECTIVE = "val/H"
HEAVY = ("state.pt", "best.safetensors")
"""What a trial keeps only until it has ended."""

Report = Callable[[dict[str, float], int], None]
"""Receives an epoch's metrics and the epoch (from 1); what it raises ends the training."""


class ValidationBundle(Bundle):
    """A bundle without its test images: whoever asks for one has a bug, and is stopped by an AssertionError."""

    @classmethod
    def of(cls, bundle: Bundle) -> ValidationBundle:
        return cls(bundle.path, bundle.info, bundle.split, bundle.classes)

    def rows(self, *roles: str) -> NDArray[np.int64]:
        assert set(roles) <= set(TRAINVAL), f"tuning asked for images with the roles {roles}"
        return super().rows(*roles)

    def image(self, row: int) -> NDArray[np.uint8]:
        role = self.split["role"].iat[row]
        assert role in TRAINVAL, f"tuning asked for a {role} image"
        return super().image(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path,)  # in a loader's process too


def _reopen(path: Path) -> ValidationBundle:
    return ValidationBundle.of(read_bundle(path))


def check_objective(config: Config, bundle: Bundle) -> None:
    """ConfigError where no trial could train, or be judged, on this bundle."""
    if not config.train.select:
        raise ConfigError("train.select=false: tuning needs the validation classes; leave it true")
    images = len(bundle.rows("train"))
    if config.optim.drop_last and images < config.optim.batch_size:
        raise ConfigError(
            f"optim.drop_last=true leaves nothing of {images} training images: expected optim.batch_size="
            f"{config.optim.batch_size} to be at most that many"
        )


def select(
    config: Config, bundle: Bundle, words: NDArray[np.float32], folder: Path, report: Report
) -> list[dict[str, Any]]:
    """Train on the train images alone, validating after each epoch; the epochs' metrics.

    What ``folder`` holds of an earlier attempt is gone on with. Raises as ``svip.training.loop.run_phase``. Processes
    that train together all call it.
    """
    assert config.train.select

    def begin() -> None:
        checkpoint.check_resumable(folder, config)
        checkpoint.write_config(folder, config)

    distributed.on_main(begin)
    phase = Phase("select", ("train",), ("train",), config.optim.epochs)
    data = ValidationBundle.of(bundle)
    _, progress = run_phase(phase, config, data, words, folder, lambda metrics, epoch, _: report(metrics, epoch))
    return progress.history


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all epochs that were trained in a trial's folder, by whichever worker."""
    return checkpoint.read_history(folder / "select" / "state.pt")


def best_of(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the best validation H, the first of them where several are best: the one training would keep."""
    return max(history, key=lambda entry: float(entry[OBJECTIVE]))


def finish_folder(folder: Path, history: list[dict[str, Any]]) -> None:
    """Keep a trial's configuration and its epochs; remove what only training needs."""
    if folder.is_dir():
        checkpoint.write_json(folder / "history.json", history)
    for name in HEAVY:
        (folder / "select" / name).unlink(missing_ok=True)
