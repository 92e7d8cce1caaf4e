"""Which pipelines there are, and what a run of each leaves."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from svip import sweep
from svip.nearest import did_you_mean
from svip.tuning.space import find_space

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


def find_pipeline(name: str, parameters: Mapping[str, Any] | None = None) -> Any:
    """The pipeline function, once its ``parameters`` are checked.

    PipelineError for an unknown name, a parameter that the pipeline lacks, or a number below 1; SweepError for an
    unknown variant, SpaceError for an unknown search space.
    """
    if name not in PIPELINES:
        hint = did_you_mean(name, PIPELINES)
        raise PipelineError(f"unknown pipeline {name!r}; {hint}there are: {', '.join(PIPELINES)}")
    pipeline, given = getattr(importlib.import_module(f"pipelines.{name}"), name), parameters or {}
    strange = sorted(set(given) - set(pipeline.component_spec.inputs))
    if strange:
        raise PipelineError(f"pipeline {name} has no {', '.join(strange)}; leave out --{' and --'.join(strange)}")
    for number in ("seeds", "trials", "workers"):
        if given.get(number, 1) < 1:
            raise PipelineError(f"{number}={given[number]}: expected at least 1")
    sweep.ablation(given.get("variants", ()))
    if not (space := given.get("space", "")).endswith((".yaml", ".yml")):  # a file may be one of a cluster's image
        find_space(space, given.get("preset", ""))
    return pipeline
