"""The model of a checkpoint as MLflow serves it ("models from code": MLflow stores this file and runs it to load).

Nothing imports this module; svip.tracking.log_checkpoint_model hands its path to MLflow.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from svip.predict import Predictor


class CheckpointModel(PythonModel):
    """A ``Predictor`` that takes encoded photos (JPEG, PNG, ...) in the column ``image``, over HTTP as base64."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights and the classes."""
        self.predictor = Predictor.load(Path(context.artifacts["model.json"]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """``params["top"]`` rows an image: image (row of the input), rank (from 1), class, score, share, attributes.

        ``params["classes"]``: a CSV of new classes to choose among instead of the checkpoint's; empty: those.
        """
        settings = params or {}
        table, images = settings.get("classes", ""), list(model_input["image"])
        try:
            if not all(isinstance(image, bytes) for image in images):  # a string would be the path of a file here
                raise ValueError("image: expected encoded photos as bytes (in JSON: base64)")
            predictor = self.predictor.among(table.encode()) if table else self.predictor
            answers = predictor(*images, top=settings.get("top", 5))
        except ValueError as error:  # of the input: the client is told, as status 400
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(
            {
                "image": row,
                "rank": rank,
                "class": ranked.name,
                "score": ranked.score,
                "share": ranked.share,
                "attributes": [asdict(evidence) for evidence in ranked.attributes],
            }
            for row, answer in enumerate(answers)
            for rank, ranked in enumerate(answer.classes, 1)
        )


set_model(CheckpointModel())
