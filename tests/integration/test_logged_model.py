"""A checkpoint logged to MLflow loads back, in a process that has no checkout of svip, and scores images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from svip.config import load_config
from svip.models.svip import SVIP
from svip.tracking import log_checkpoint_model, open_tracker
from svip.training.checkpoint import save_model

SIDE, GAMMA = 32, 0.25
CLASSES = pd.DataFrame(
    {
        "name": ["cat", "dog", "axolotl"],
        "role": ["train", "val_unseen", "test_unseen"],
        "has fur": np.array([1, 1, 0], np.float32),
        "barks": np.array([0, 1, 0], np.float32),
        "has gills": np.array([0, 0, 1], np.float32),
    }
)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, store_file: Path) -> tuple[str, str, SVIP]:
    """(model URI, run id, the model itself) of an untrained model with three attributes."""
    folder = tmp_path_factory.mktemp("logged")
    config = load_config(
        "smoke",
        [
            "model.backbone_args.depth=1",
            "model.backbone_args.embed_dim=16",
            "model.backbone_args.num_heads=2",
            f"data.image_size={SIDE}",
            "data.store_size=32",
            "model.selected_groups=2",
            "model.sigma=20",
        ],
    )
    model = SVIP(config.model, SIDE, torch.randn(3, 5, generator=torch.Generator().manual_seed(0))).eval()
    save_model(folder, model, config, {"attributes": 3, "gamma": GAMMA})
    (folder / "state").mkdir()
    (folder / "state" / "huge.pt").write_text("the optimiser's state is not part of the model")
    CLASSES.to_parquet(folder / "classes.parquet")
    with open_tracker("svip/logged", "train") as tracker:
        uri = log_checkpoint_model(tracker, folder, folder)
    return uri, tracker.run_id, model


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_it_predicts_what_the_checkpoint_predicts_with_gamma_off_the_seen_classes(
    logged: tuple[str, str, SVIP],
) -> None:
    uri, _, model = logged
    scores = mlflow.pyfunc.load_model(uri).predict(images(2))
    attributes = model.predict(torch.from_numpy(images(2)).permute(0, 3, 1, 2)).attributes.numpy()
    matrix = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], np.float32)
    norms = np.linalg.norm(attributes, axis=1)[:, None] * np.linalg.norm(matrix, axis=1)
    expected = 20 * attributes @ matrix.T / norms - GAMMA * np.array([1, 1, 0], np.float32)
    assert list(scores.columns) == ["cat", "dog", "axolotl"]
    np.testing.assert_allclose(scores.to_numpy(), expected, rtol=1e-4, atol=1e-5)


def test_it_refuses_images_of_another_size(logged: tuple[str, str, SVIP]) -> None:
    with pytest.raises(MlflowException, match="shape"):
        mlflow.pyfunc.load_model(logged[0]).predict(np.zeros((1, SIDE + 1, SIDE, 3), np.uint8))


def test_it_belongs_to_its_run_and_holds_only_what_it_needs(logged: tuple[str, str, SVIP]) -> None:
    uri, run_id, _ = logged
    info = mlflow.models.get_model_info(uri)
    assert info.run_id == run_id
    model = mlflow.MlflowClient().get_logged_model(uri.removeprefix("models:/"))
    assert model.experiment_id == mlflow.MlflowClient().get_run(run_id).info.experiment_id
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    assert {path.name for path in (folder / "artifacts").iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "model.json",
        "classes.parquet",
    }
    assert (folder / "code" / "svip" / "presets" / "smoke.yaml").exists()
    assert not list(folder.rglob("*.pkl")), "no pickle: what is loaded can be read"
    assert f"torch=={torch.__version__.split('+')[0]}" in (folder / "requirements.txt").read_text()


@pytest.mark.slow
def test_it_loads_with_the_code_that_it_carries(logged: tuple[str, str, SVIP], tmp_path: Path) -> None:
    code = (
        "import mlflow, numpy as np\n"
        f"model = mlflow.pyfunc.load_model({logged[0]!r})\n"
        f"print(model.predict(np.zeros((1, {SIDE}, {SIDE}, 3), np.uint8)).shape)\n"
        "import svip; print(svip.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    shape, where = done.stdout.strip().splitlines()[-2:]
    assert shape == "(1, 3)"
    assert "/code/svip/" in where, "svip of the logged model comes first"
