"""A checkpoint logged to MLflow loads back, in a process that has no checkout of svip, and is served over HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from PIL import Image

from benchmarks.ports import free_port
from svip.config import load_config
from svip.models.svip import SVIP
from svip.predict import Predictor
from svip.tracking import log_checkpoint_model, open_tracker
from svip.training.checkpoint import save_model, write_classes

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
NEW = "name,barks,has fur,has gills\nseal,1,1,0\ncarp,0,0,1\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with three attributes, and files that don't belong to it."""
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
            "train.device=cpu",
        ],
    )
    torch.manual_seed(0)
    model = SVIP(config.model, SIDE, torch.randn(3, 5))
    save_model(folder, model, config, {"attributes": 3, "gamma": GAMMA})
    write_classes(folder, CLASSES)
    (folder / "state").mkdir()
    (folder / "state" / "huge.pt").write_text("the optimiser's state is not part of the model")
    return folder


@pytest.fixture(scope="module")
def logged(checkpoint: Path, store_file: Path) -> tuple[str, str]:
    """Model URI and run id."""
    with open_tracker("svip/logged", "train") as tracker:
        return log_checkpoint_model(tracker, checkpoint), tracker.run_id


def photo(seed: int) -> bytes:
    """An encoded JPEG, wider than high."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((64, 40)).save(file, "jpeg")
    return file.getvalue()


def rows(predictor: Predictor, photos: list[bytes], top: int) -> list[dict[str, Any]]:
    """What the served model has to answer, as JSON carries it."""
    return [
        {"image": n, "rank": rank, "class": c["name"], **{key: c[key] for key in ("score", "share", "attributes")}}
        for n, answer in enumerate(predictor(*photos, top=top))
        for rank, c in enumerate(json.loads(json.dumps(answer.to_dict()))["classes"], 1)
    ]


def test_it_answers_as_the_predictor_does(checkpoint: Path, logged: tuple[str, str]) -> None:
    model, predictor, photos = mlflow.pyfunc.load_model(logged[0]), Predictor.load(checkpoint), [photo(1), photo(2)]
    table = pd.DataFrame({"image": photos})
    answer = json.loads(model.predict(table).to_json(orient="records", double_precision=15))
    expected = rows(predictor, photos, top=5)
    assert len(expected) == 2 * 3, "three classes are all there are"
    for found, row in zip(answer, expected, strict=True):
        assert found | {"score": 0, "share": 0, "attributes": 0} == row | {"score": 0, "share": 0, "attributes": 0}
        assert (found["score"], found["share"]) == pytest.approx((row["score"], row["share"]), rel=1e-6)
    best = model.predict(table, params={"top": 1, "classes": NEW})
    assert list(best["class"]) == [row["class"] for row in rows(predictor.among(NEW.encode()), photos, top=1)]
    assert list(best["rank"]) == [1, 1] and list(best["image"]) == [0, 1]


@pytest.mark.parametrize(
    ("column", "params", "message"),
    [
        ({"image": [photo(1), b"no photo"]}, {}, "1 of 2 images can't be read:\n  image 2"),
        ({"image": ["/etc/passwd"]}, {}, "expected encoded photos as bytes"),
        ({"image": [photo(1)]}, {"classes": "name,barks\nseal,1"}, "missing column 'has fur'"),
        ({"image": [photo(1)]}, {"top": 0}, "top=0: expected at least 1"),
        ({"photo": [photo(1)]}, {}, "missing inputs ['image']"),
        ({"image": [photo(1)]}, {"top": "many"}, "'top'"),
    ],
)
def test_what_it_can_not_answer_is_said(
    logged: tuple[str, str], column: dict[str, Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlflowException) as error:
        mlflow.pyfunc.load_model(logged[0]).predict(pd.DataFrame(column), params=params)
    assert message in str(error.value)


def test_it_belongs_to_its_run_and_holds_only_what_it_needs(logged: tuple[str, str]) -> None:
    uri, run_id = logged
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


def test_its_signature_says_what_goes_in_and_its_example_fits(logged: tuple[str, str]) -> None:
    model = mlflow.pyfunc.load_model(logged[0])
    signature = model.metadata.signature
    assert [(column.name, column.type.name) for column in signature.inputs] == [("image", "binary")]
    assert {param.name: param.default for param in signature.params} == {"top": 5, "classes": ""}
    answer = model.predict(model.input_example)
    assert list(answer.columns) == ["image", "rank", "class", "score", "share", "attributes"]
    assert list(answer["rank"]) == [1, 2, 3]


@pytest.mark.slow
def test_it_loads_with_the_code_that_it_carries(logged: tuple[str, str], tmp_path: Path) -> None:
    code = (
        "import mlflow\n"
        f"model = mlflow.pyfunc.load_model({logged[0]!r})\n"
        "print(model.predict(model.input_example).shape)\n"
        "import svip, sys; print(svip.__file__)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'gensim', 'jinja2', 'matplotlib', 'typer'}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    shape, where, others = done.stdout.strip().splitlines()[-3:]
    assert shape == "(3, 6)"
    assert "/code/svip/" in where, "svip of the logged model comes first"
    assert others == "[]", "what its requirements don't list"


@pytest.mark.slow
def test_mlflow_serves_it(checkpoint: Path, logged: tuple[str, str], tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", logged[0], "--env-manager", "local"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the server starts processes of its own
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while not _answers(f"{address}/ping"):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        photos, predictor = [photo(1), photo(2)], Predictor.load(checkpoint)
        encoded = [[base64.b64encode(data).decode()] for data in photos]
        body: dict[str, Any] = {"dataframe_split": {"columns": ["image"], "data": encoded}}
        for params, expected in (
            ({}, rows(predictor, photos, top=5)),
            ({"top": 1, "classes": NEW}, rows(predictor.among(NEW.encode()), photos, top=1)),
        ):
            reply = requests.post(f"{address}/invocations", json=body | {"params": params}, timeout=60)
            assert reply.status_code == 200, reply.text
            for found, row in zip(reply.json()["predictions"], expected, strict=True):
                numbers = [
                    (r.pop("score"), r.pop("share"), *(e.pop("value") for e in r["attributes"])) for r in (found, row)
                ]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
                assert found == row
        body["dataframe_split"]["data"] = [[base64.b64encode(b"no photo").decode()]]
        reply = requests.post(f"{address}/invocations", json=body, timeout=60)
        assert reply.status_code == 400 and "1 of 1 images can't be read" in reply.json()["message"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def test_logging_that_broke_off_is_finished_and_done_once(checkpoint: Path, store: str) -> None:
    client = mlflow.MlflowClient(store)
    with open_tracker("svip/broken-off", "train") as tracker:
        experiment = client.get_run(tracker.run_id).info.experiment_id
        digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        begun = client.create_logged_model(experiment, "model", tracker.run_id, {"weights_sha256": digest})
        client.log_outputs(tracker.run_id, [LoggedModelOutput(begun.model_id, 0)])
        uri = log_checkpoint_model(tracker, checkpoint)
        assert uri == f"models:/{begun.model_id}" == log_checkpoint_model(tracker, checkpoint)
    (model,) = client.search_logged_models([experiment])
    assert model.status == "READY"
    outputs = client.get_run(tracker.run_id).outputs
    assert outputs and [output.model_id for output in outputs.model_outputs] == [begun.model_id]
