"""Trained models in MLflow."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import svip
from svip.tracking.inputs import Data
from svip.tracking.runs import Tracker
from svip.tracking.store import tracking_uri

log = logging.getLogger(__name__)

CHECKPOINT_FILES = ("model.safetensors", "config.yaml", "model.json", "classes.parquet")
REQUIREMENTS = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "omegaconf", "safetensors", "pillow")
"""What svip needs to load and run a checkpoint (tqdm comes with timm); logged with the versions that are installed."""


def log_checkpoint_model(tracker: Tracker, checkpoint: Path, name: str = "model") -> str:
    """Log a checkpoint as an MLflow model; its URI (``models:/...``), or "" without a run.

    ``mlflow models serve`` answers with it: see svip.mlflow_model for what goes in and comes out. The model carries
    svip's code, the weights and the classes, and needs nothing of this checkout.
    """
    if tracker.client is None:
        return ""
    import mlflow
    import pandas as pd  # here, as every command imports this module and few log a model
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from PIL import Image

    package = Path(svip.__file__).parent
    mlflow.set_tracking_uri(tracking_uri())  # Model.log knows no other way
    # Model.log would put it in MLflow's default experiment, not in the run's.
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    model = tracker.client.create_logged_model(experiment, name, source_run_id=tracker.run_id)
    photo, path = io.BytesIO(), sys.path.copy()
    Image.new("RGB", (64, 64), "grey").save(photo, "png")
    info = Model.log(
        artifact_path=None,
        name=name,
        flavor=mlflow.pyfunc,
        run_id=tracker.run_id,
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
    """Log what an evaluation measured on ``data``, to its run and to the model that the training logged.

    MLflow's page of the model shows them then. Where there is no such model, or the server doesn't say, the run alone
    has them.
    """
    if tracker.client is None:
        return
    from mlflow.entities import LoggedModelInput, Metric
    from mlflow.exceptions import MlflowException

    try:
        outputs = tracker.client.get_run(train_run_id).outputs if train_run_id else None
        if outputs and outputs.model_outputs:
            model_id, now = outputs.model_outputs[-1].model_id, int(time.time() * 1000)
            tracker.client.log_inputs(tracker.run_id, models=[LoggedModelInput(model_id)])
            tested_on = {"dataset_name": data.name, "dataset_digest": data.digest}
            metrics = [Metric(key, float(v), now, 0, model_id=model_id, **tested_on) for key, v in numbers.items()]
            tracker.client.log_batch(tracker.run_id, metrics)
            return
    except MlflowException as error:
        log.warning("the model of run %s does not get its test results: %s", train_run_id, str(error).splitlines()[0])
    tracker.log_metrics(numbers)
