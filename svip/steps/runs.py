"""The MLflow run that frames a pipeline, and what the runs of all steps are called."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from svip import tracking
from svip.config import Config, flatten, load_config, variant

KFP_RUN_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""How a Kubeflow Pipelines server names a run; on one machine a pipeline's job has a plain number."""


def open_run(pipeline: str, preset: str, overrides: Sequence[str] = (), continues: str = "") -> str:
    """Check the configuration, start the MLflow run that all steps belong to, and return its id.

    ``continues``: the pipeline whose run is opened again instead, if it got as far as having one.
    """
    config = load_config(preset, overrides)
    job = re.search(rf"-({KFP_RUN_ID})$", pipeline)
    tags = {"preset": preset, tracking.KFP_RUN_TAG: job[1] if job else ""}
    return tracking.open_run(pipeline, experiment_of(config), flatten(config), tags, continues)


def data_settings(preset: str, overrides: Sequence[str] = ()) -> list[str]:
    """All of ``data.*`` and ``semantics.*`` as overrides: on nothing else do the bundle and the vectors depend."""
    values = flatten(load_config(preset, overrides))
    return [f"{key}={json.dumps(values[key])}" for key in values if key.startswith(("data.", "semantics."))]


def close_run(run_id: str, status: str) -> None:
    """End the parent run: FINISHED, FAILED or KILLED."""
    tracking.close_run(run_id, status)


def named(config: Config, run: str) -> dict[str, str]:
    """Tags that say what is trained: the ablation's own name for it where there is one."""
    return {"variant": run.partition(":")[0] or variant(config), "seed": str(config.train.seed)}


def experiment_of(config: Config) -> str:
    return f"svip/{config.data.dataset}"
