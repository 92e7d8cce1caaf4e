"""What goes into a run: the data that it used, and the files from which it can be done again."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svip.tracking.lineage import code_diff, environment, environment_text
from svip.tracking.runs import Tracker

log = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, CODE, VECTORS = "config.yaml", "environment.txt", "code.diff", "vectors"
"""Artifacts of a run that say how to do it again; the last one is a folder."""
KFP_RUN_TAG = "kfp_run_id"
"""Of a pipeline's parent run."""


@dataclass(frozen=True)
class Data:
    """A data set as MLflow's pages list it under "Datasets used"."""

    name: str
    sha256: str
    address: str
    """A folder, a file, or an s3:// or http(s):// address without a password."""
    context: str
    """What the run did with it, such as ``training``."""
    profile: Mapping[str, object] = field(default_factory=dict)
    """Counts and the like."""

    @property
    def digest(self) -> str:
        return self.sha256[:12]


def log_lineage(tracker: Tracker, config_yaml: str, device: str, vectors: Path | None = None) -> None:
    """Log the resolved configuration, the environment, uncommitted changes of the code, and the word vectors."""
    if tracker.client is None:
        return
    diff = code_diff()
    tracker.set_tags({"device": device, **({"code_diff_sha256": diff.sha256} if diff else {})})
    with tempfile.TemporaryDirectory() as folder:
        files = {CONFIG: config_yaml, ENVIRONMENT: environment_text(environment(device))}
        if diff:
            files[CODE] = diff.text
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tracker.log_artifact(Path(folder))
    if vectors:
        tracker.log_artifact(vectors, VECTORS)


def log_data(tracker: Tracker, data: Sequence[Data]) -> None:
    """Say which data the run used. Where the server doesn't answer, the run's tags alone say it."""
    if tracker.client is None:
        return
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = [
        DatasetInput(
            Dataset(
                name=item.name,
                digest=item.digest,
                source_type=_source_type(item.address),
                source=json.dumps({"url" if item.address.startswith("http") else "uri": item.address}),
                profile=json.dumps(dict(item.profile)),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, item.context)],
        )
        for item in data
    ]
    try:
        tracker.client.log_inputs(tracker.run_id, inputs)
    except MlflowException as error:
        log.warning("MLflow does not list the data of run %s: %s", tracker.run_id, str(error).splitlines()[0])


def _source_type(address: str) -> str:
    scheme = address.partition("://")[0] if "://" in address else ""
    return {"": "local", "https": "http"}.get(scheme, scheme)
