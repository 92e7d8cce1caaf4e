"""What goes to MLflow. Nothing else in svip imports mlflow, save the model code that MLflow itself runs (mlflow_model).

A pipeline is a parent run (open_run, close_run); every step, variant and trial is a child run (open_tracker). All of
it goes through MlflowClient, so no run is ever "active" in the process, and by way of an outbox, so none waits for a
server: Tracker (runs) -> Journal (outbox) -> Sender, or later sync -> Delivery.
"""

from svip.tracking.inputs import CONFIG, ENVIRONMENT, KFP_RUN_TAG, VECTORS, Data, log_data, log_lineage
from svip.tracking.lineage import code_diff, environment, git_sha
from svip.tracking.models import log_checkpoint_model, log_results
from svip.tracking.outbox import outbox_folder
from svip.tracking.pipeline_runs import close_run, open_run
from svip.tracking.recorded import TRAIN_RUN_TAG, History, Recorded, find_evaluation, find_runs, read_run
from svip.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    EVALUATION_TAG,
    Version,
    champion_of,
    describe,
    model_status,
    register_version,
    set_alias,
    version_of,
)
from svip.tracking.runs import DESCRIPTION, Tracker, log_to_run, open_tracker, runs_of_their_own
from svip.tracking.search import evaluations_of, search_evaluations
from svip.tracking.store import TrackingError, check_tracked, shown_uri, tracking_uri, without_password
from svip.tracking.sync import sync
from svip.tracking.system import system_metrics

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "CONFIG",
    "ENVIRONMENT",
    "EVALUATION_TAG",
    "KFP_RUN_TAG",
    "TRAIN_RUN_TAG",
    "VECTORS",
    "Data",
    "History",
    "Recorded",
    "DESCRIPTION",
    "Tracker",
    "TrackingError",
    "Version",
    "champion_of",
    "check_tracked",
    "close_run",
    "code_diff",
    "describe",
    "environment",
    "find_evaluation",
    "find_runs",
    "evaluations_of",
    "git_sha",
    "log_checkpoint_model",
    "log_data",
    "log_lineage",
    "log_results",
    "log_to_run",
    "model_status",
    "open_run",
    "open_tracker",
    "outbox_folder",
    "read_run",
    "register_version",
    "runs_of_their_own",
    "set_alias",
    "search_evaluations",
    "shown_uri",
    "sync",
    "system_metrics",
    "tracking_uri",
    "version_of",
    "without_password",
]
