"""What goes into a run: the data that it used, and the files from which it can be done again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svip.tracking.delivery import handles
from svip.tracking.lineage import code_diff, environment, environment_text
from svip.tracking.outbox import Journal
from svip.tracking.runs import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    profile: dict[str, Any] = field(default_factory=dict)
    """Counts and the like."""

    @property
    def digest(self) -> str:
        return self.sha256[:12]


def log_lineage(
    tracker: Tracker, config_yaml: str, device: str, write_vectors: Callable[[Path], None] | None = None
) -> None:
    """Log the resolved configuration, the environment, uncommitted changes of the code, and the word vectors.

    ``write_vectors`` makes the folder of the vectors, for a run that needs some.
    """
    if not tracker.run_id:
        return
    diff = code_diff()
    tracker.set_tags({"device": device, **({"code_diff_sha256": diff.sha256} if diff else {})})
    with tempfile.TemporaryDirectory() as folder:
        files = {CONFIG: config_yaml, ENVIRONMENT: environment_text(environment(device))}
        if diff:
            files[CODE] = diff.text
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        if write_vectors:
            write_vectors(Path(folder) / VECTORS)
        tracker.log_artifact(Path(folder))


def log_data(tracker: Tracker, data: Sequence[Data]) -> None:
    """Say which data the run used."""
    tracker.put("data", data=[asdict(item) for item in data])


@handles("data")
def _send_data(client: MlflowClient, journal: Journal, record: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = [
        DatasetInput(
            Dataset(
                name=item.name,
                digest=item.digest,
                source_type=_source_type(item.address),
                source=json.dumps({"url" if item.address.startswith("http") else "uri": item.address}),
                profile=json.dumps(item.profile),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, item.context)],
        )
        for item in (Data(**fields) for fields in record["data"])
    ]
    client.log_inputs(journal.run_id, inputs)


def _source_type(address: str) -> str:
    scheme = address.partition("://")[0] if "://" in address else "local"
    return "http" if scheme == "https" else scheme
