"""A released checkpoint from the command line: imported, evaluated and reported on like a trained one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from small_training import ATTRIBUTES, TINY, write_bundle

from svip import steps, tracking
from svip.config import load_config
from svip.data.bundle import Bundle
from svip.evaluation.evaluate import check_bundle
from svip.models.published import published_name
from svip.models.svip import SVIP
from svip.training.checkpoint import CheckpointError, read_config

IMAGE_ROLES = {
    "train": ["train", "test_seen", "test_seen"],
    "val_unseen": ["val_unseen", "test_seen"],
    "test_unseen": ["test_unseen"] * 3,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", IMAGE_ROLES)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Import a file of random weights into ``out``."""
    words = torch.randn(ATTRIBUTES, 7)
    config = load_config("smoke", TINY)
    network = {published_name(name): tensor for name, tensor in SVIP(config.model, 16, words).named_parameters()}
    torch.save({"network": network, "args": argparse.Namespace(), "best": np.float64(1)}, tmp_path / "released.pth")
    np.save(tmp_path / "words.npy", words.numpy())

    def run(out: Path, *overrides: str, bundle: str = "") -> dict[str, object]:
        arguments = (str(tmp_path / "released.pth"), str(tmp_path / "words.npy"), str(out), "smoke")
        return steps.import_checkpoint(*arguments, [*TINY, *overrides], bundle)

    return run


def test_an_imported_checkpoint_is_evaluated_and_reported_on(
    tmp_path: Path, bundle: Bundle, run: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "run")
    metrics = steps.evaluate(str(tmp_path / "run"), str(bundle.path), str(tmp_path / "test"))
    assert "run is imported: whether it was trained on images" in caplog.text
    assert sorted(metrics["protocols"]) == ["none", "oracle"], "there is no gamma of validation classes"
    assert metrics["comparators"] == {}
    arguments = (tmp_path / "test", tmp_path / "run", bundle.path, tmp_path / "report")
    page = Path(steps.report(*map(str, arguments))).read_text()
    assert "released.pth" in page
    assert "minutes" not in page and "Training losses" not in page


def test_a_bundle_of_another_kind_is_refused(tmp_path: Path, bundle: Bundle, run: Callable[..., object]) -> None:
    run(tmp_path / "cub", "data.dataset=cub")
    with pytest.raises(
        CheckpointError, match="cub is for cub, standard split, 6 attributes, and .*/bundle is synthetic"
    ):
        steps.evaluate(str(tmp_path / "cub"), str(bundle.path), str(tmp_path / "test"))
    with pytest.raises(CheckpointError, match="is for synthetic, development split"):
        run(tmp_path / "run", "data.split=development", bundle=str(bundle.path))
    assert not (tmp_path / "run").exists()
    config, info = load_config("smoke", TINY), {"bundle_sha256": None, "attributes": ATTRIBUTES}
    check_bundle(tmp_path, config, info, bundle)
    with pytest.raises(CheckpointError, match=f"{ATTRIBUTES + 1} attributes, and .* {ATTRIBUTES} attributes"):
        check_bundle(tmp_path, config, info | {"attributes": ATTRIBUTES + 1}, bundle)


def test_one_imported_with_a_bundle_is_tested_on_that_one_only(
    tmp_path: Path, bundle: Bundle, run: Callable[..., object], caplog: pytest.LogCaptureFixture, store: str
) -> None:
    run(tmp_path / "run", bundle=str(bundle.path))
    caplog.clear()
    assert read_config(tmp_path / "run").train.select is False
    steps.evaluate(str(tmp_path / "run"), str(bundle.path), str(tmp_path / "test"))
    assert "imported" not in caplog.text
    other = write_bundle(tmp_path / "other", IMAGE_ROLES, other_tests=True)
    parent = tracking.open_run("refused", "svip/synthetic", {})
    with pytest.raises(CheckpointError, match="test it on the bundle"):
        steps.evaluate(str(tmp_path / "run"), str(other.path), str(tmp_path / "test"), parent)
    client = MlflowClient(store)
    experiments = [client.get_run(parent).info.experiment_id]
    assert client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'") == [], "not even a failed run"
