"""What goes to MLflow. Nothing else in svip imports mlflow, save the model code that MLflow itself runs (mlflow_model).

A pipeline is a parent run (open_run, close_run); every step, variant and trial is a child run (open_tracker). All of
it goes through MlflowClient, so no run is ever "active" in the process.
"""

from svip.tracking.lineage import git_sha
from svip.tracking.models import log_checkpoint_model
from svip.tracking.pipeline_runs import close_run, open_run
from svip.tracking.runs import DESCRIPTION, Tracker, log_to_run, open_tracker, runs_of_their_own
from svip.tracking.search import TestedRun, evaluations_of, search_evaluations
from svip.tracking.store import TrackingError, shown_uri, tracking_uri

__all__ = [
    "DESCRIPTION",
    "TestedRun",
    "Tracker",
    "TrackingError",
    "close_run",
    "evaluations_of",
    "git_sha",
    "log_checkpoint_model",
    "log_to_run",
    "open_run",
    "open_tracker",
    "runs_of_their_own",
    "search_evaluations",
    "shown_uri",
    "tracking_uri",
]
