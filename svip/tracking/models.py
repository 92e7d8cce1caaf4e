"""Trained models in MLflow."""

from __future__ import annotations

import hashlib
import io
import logging
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import svip
from svip.tracking.delivery import handles, known_id
from svip.tracking.inputs import Data
from svip.tracking.outbox import Journal, now
from svip.tracking.runs import Tracker
from svip.tracking.store import first_line, is_away, run_exists, use_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CHECKPOINT_FILES = ("model.safetensors", "config.yaml", "model.json", "classes.parquet")
WEIGHTS_TAG = "weights_sha256"
REQUIREMENTS = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "omegaconf", "safetensors", "pillow")
"""What svip needs to load and run a checkpoint (tqdm comes with timm); logged with the versions that are installed."""


def log_checkpoint_model(tracker: Tracker, checkpoint: Path, name: str = "model") -> str:
    """Log a checkpoint as an MLflow model; its URI (``models:/...``), or "" without a run.

    ``mlflow models serve`` answers with it: see svip.mlflow_model for what goes in and comes out. The model carries
    svip's code, the weights and the classes, and needs nothing of this checkout. Where the server doesn't answer it
    is "" too: the model is logged when it does again, from the checkpoint, which has to stay where it is.
    """
    if tracker.client is None:
        return ""
    if tracker.flush():
        try:
            return _log_model(tracker.client, tracker.run_id, checkpoint, name)
        except Exception as error:  # whatever it is, the checkpoint is there and its training a success
            if not is_away(error):
                log.warning("the model of run %s is not in MLflow: %s", tracker.run_id, first_line(error))
                return ""
    log.warning("the model of run %s is not in MLflow yet: it will be logged from %s", tracker.run_id, checkpoint)
    tracker.put("model", checkpoint=str(checkpoint.absolute()), name=name)
    return ""


@handles("model")
def _send_model(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    _log_model(client, journal.run_id, Path(record["checkpoint"]), record["name"])


def _log_model(client: MlflowClient, run_id: str, checkpoint: Path, name: str) -> str:
    """A run has the same weights once: a second call goes on with the model that the first one began."""
    import mlflow
    import pandas as pd  # here, as every command imports this module and few log a model
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from PIL import Image

    with (checkpoint / "model.safetensors").open("rb") as file:  # FileNotFoundError, where it was removed meanwhile
        tag = {WEIGHTS_TAG: hashlib.file_digest(file, "sha256").hexdigest()}
    package = Path(svip.__file__).parent
    use_store(client)  # for Model.log
    # Model.log would put it in MLflow's default experiment, not in the run's.
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    same = client.search_logged_models([experiment], f"tags.{WEIGHTS_TAG} = '{tag[WEIGHTS_TAG]}'")
    begun = [model for model in same if model.source_run_id == run_id]
    model = begun[0] if begun else client.create_logged_model(experiment, name, run_id, tag)
    if model.status == "READY":
        return str(model.model_uri)
    linked = run.outputs is not None and model.model_id in {output.model_id for output in run.outputs.model_outputs}
    photo, path = io.BytesIO(), sys.path.copy()
    Image.new("RGB", (64, 64), "grey").save(photo, "png")
    info = Model.log(
        artifact_path=None,
        name=name,
        flavor=mlflow.pyfunc,
        run_id=None if linked else run_id,  # MLflow would link it again, and fail
        model_id=model.model_id,
        python_model=str(package / "mlflow_model.py"),
        artifacts={file: str(checkpoint / file) for file in CHECKPOINT_FILES},
        code_paths=[str(package)],
        pip_requirements=[f"{requirement}=={version(requirement)}" for requirement in REQUIREMENTS],
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            params=ParamSchema([ParamSpec("top", DataType.long, 5), ParamSpec("classes", DataType.string, "")]),
        ),
        input_example=(pd.DataFrame({"image": [photo.getvalue()]}), {"top": 5, "classes": ""}),
    )
    sys.path[:] = path  # MLflow has tried the example on the model, whose temporary folder it leaves here
    return str(info.model_uri)


def log_results(tracker: Tracker, numbers: Mapping[str, float], train_run_id: str, data: Data) -> None:
    """Log what an evaluation measured on ``data``: to its run, and to the model that the training logged.

    So the model's page in MLflow shows them. Where the training logged none (in an ablation), the run alone has them.
    """
    tested_on = {"dataset_name": data.name, "dataset_digest": data.digest}
    values = {key: float(value) for key, value in numbers.items()}
    tracker.put("results", metrics=values, train_run_id=train_run_id, tested_on=tested_on, time=now())


@handles("results")
def _send_results(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    from mlflow.entities import LoggedModelInput, Metric

    trained_by = known_id(client, record["train_run_id"])
    outputs = client.get_run(trained_by).outputs if trained_by and run_exists(client, trained_by) else None
    model: dict[str, str] = {}
    if outputs and outputs.model_outputs:
        model = {"model_id": outputs.model_outputs[-1].model_id, **record["tested_on"]}
        client.log_inputs(journal.run_id, models=[LoggedModelInput(model["model_id"])])
    metrics = [Metric(key, value, record["time"], 0, **model) for key, value in record["metrics"].items()]
    client.log_batch(journal.run_id, metrics)
