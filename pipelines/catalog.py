"""Which pipelines there are, and what a run of each leaves."""

from __future__ import annotations

import importlib
from typing import Any

DATA = {"bundle": "prepare-data/bundle", "vectors": "embed-attributes/vectors"}
RESULTS = {
    "experiment": {
        **DATA,
        "checkpoint": "train/checkpoint",
        "evaluation": "evaluate/evaluation",
        "metrics.json": "evaluate/evaluation/metrics.json",
        "report.html": "report/page",
        "results.md": "report/files/results.md",
    },
    "ablation": {
        **DATA,
        "ablation.md": "ablate-table/files/ablation.md",
        "ablation.csv": "ablate-table/files/ablation.csv",
        "ablation.html": "ablate-table/page",
    },
    "tuning": {
        **DATA,
        "study": "plan-tuning/study",
        "tuning.html": "tuning-report/page",
        "best.yaml": "tuning-report/files/best.yaml",
        "trials.csv": "tuning-report/files/trials.csv",
        "checkpoint": "train/checkpoint",
        "evaluation": "evaluate/evaluation",
        "metrics.json": "evaluate/evaluation/metrics.json",
        "report.html": "report/page",
        "results.md": "report/files/results.md",
    },
}
"""Pipeline -> what a run leaves in its output folder -> where Kubeflow put it, as TASK/ARTIFACT."""
PIPELINES = tuple(RESULTS)
"""Each is the function of that name in the module of that name."""


class PipelineError(RuntimeError):
    """A pipeline that failed; the message names the step."""


def find_pipeline(name: str) -> Any:
    """The pipeline function; PipelineError for an unknown name."""
    if name not in PIPELINES:
        raise PipelineError(f"unknown pipeline {name!r}; there are: {', '.join(PIPELINES)}")
    return getattr(importlib.import_module(f"pipelines.{name}"), name)
