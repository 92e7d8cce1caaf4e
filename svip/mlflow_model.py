"""The model of a checkpoint as MLflow serves it ("models from code": MLflow stores this file and runs it to load).

Nothing imports this module; svip.tracking.log_checkpoint_model hands its path to MLflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from svip.training.checkpoint import load_model


class CheckpointModel(PythonModel):
    """Scores images against all classes of the bundle that the checkpoint was trained on."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights and the class-attribute matrix."""
        self.model, _, self.info = load_model(Path(context.artifacts["model.json"]).parent)
        classes = pd.read_parquet(context.artifacts["classes.parquet"])
        self.names = classes["name"].tolist()
        self.seen = torch.tensor((classes["role"] != "test_unseen").to_numpy())
        self.class_attributes = torch.tensor(classes.drop(columns=["name", "role"]).to_numpy(np.float32))

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """uint8 [B, S, S, 3] -> float scores [B, C], one column a class; gamma is already off the seen classes."""
        images = torch.from_numpy(np.ascontiguousarray(model_input)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            scores = self.model.class_scores(self.model.predict(images).attributes, self.class_attributes)
        scores = scores - (self.info["gamma"] or 0.0) * self.seen
        return pd.DataFrame(scores.numpy(), columns=self.names)


set_model(CheckpointModel())
