"""``svip figures`` on small trained checkpoints: the files, the page, what MLflow keeps, and what is left out."""

from __future__ import annotations

import base64
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from small_training import ATTRIBUTES, TINY, write_bundle
from typer.testing import CliRunner

from svip import steps
from svip.cli import app
from svip.config import load_config
from svip.data.bundle import Bundle
from svip.training import loop
from svip.training.checkpoint import CheckpointError

IMAGE_ROLES = {
    "train": ["train"] * 2 + ["test_seen"],
    "val_unseen": ["val_unseen"] * 2,
    "test_unseen": ["test_unseen"] * 3,
}
VARIANTS = {
    "svip": [],
    "baseline": ["model.contextualize=none", "model.readout=cls"],
    "drop": ["model.contextualize=drop", "train.precision=bf16"],
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("data") / "bundle", IMAGE_ROLES)


@pytest.fixture(scope="module")
def checkpoints(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    words = np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)
    for name, overrides in VARIANTS.items():
        config = load_config("smoke", [*TINY, "optim.epochs=1", "train.select=false", *overrides])
        loop.train(config, bundle, words, folder / name, lambda *_: None)
    return folder


def test_the_command_draws_four_figures_and_a_page_that_needs_nothing_else(
    bundle: Bundle, checkpoints: Path, store: str, tmp_path: Path
) -> None:
    names = ["attention", "localization", "patches", "attributes"]
    options = ["--checkpoint", checkpoints / "svip", "--bundle", bundle.path, "--baseline", checkpoints / "baseline"]
    parent = steps.open_run("experiment", "smoke")
    more = ["--images", 2, "--out", tmp_path / "out", "--parent-run-id", parent]
    result = CliRunner().invoke(app, ["figures", *map(str, [*options, *more])], catch_exceptions=False)
    assert result.exit_code == 0
    files = [tmp_path / "out" / name for name in [*(f"{name}.png" for name in names), "figures.html"]]
    assert result.stdout.split() == [str(file) for file in files]
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(files)

    page = files[-1].read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [address for address in addresses if not address.startswith("data:")] == []
    images = [base64.b64decode(address.partition("base64,")[2]) for address in addresses if "base64" in address]
    assert images == [file.read_bytes() for file in files[:-1]]
    assert re.findall(r"<b>Figure (\d)", page) == ["3", "5", "6", "7"]
    assert "Baseline reads only the class token" in page and "kept 2 of 4" in page
    for file in files[:-1]:
        pixels = np.asarray(Image.open(file).convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5, "it shows something"

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("svip/synthetic")
    assert experiment is not None
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.step = 'figures'"
    (run,) = client.search_runs([experiment.experiment_id], query)
    assert run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {file.name for file in files}


def test_two_runs_write_the_same_figures(bundle: Bundle, checkpoints: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        steps.figures(str(checkpoints / "svip"), str(bundle.path), str(tmp_path / out))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("name", "patches"), [("baseline", False), ("drop", True)])
def test_a_model_gets_the_figures_that_make_sense_for_it_beside_its_checkpoint(
    bundle: Bundle, checkpoints: Path, name: str, patches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        files = steps.figures(str(checkpoints / name), str(bundle.path))
    drawn = [Path(file).stem for file in files]
    assert drawn == ["attention", "localization", *(["patches"] if patches else []), "attributes", "figures"]
    assert {Path(file).parent for file in files} == {checkpoints / name / "figures"}
    said = [record.message for record in caplog.records if "figure 6 is left out" in record.message]
    assert said == ([] if patches else ["figure 6 is left out: Baseline leaves out no patches"])


def test_a_checkpoint_of_another_bundle_is_refused(bundle: Bundle, checkpoints: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", IMAGE_ROLES, other_tests=True)
    with pytest.raises(CheckpointError, match=f"svip was trained on bundle {bundle.sha256[:12]}"):
        steps.figures(str(checkpoints / "svip"), str(other.path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
