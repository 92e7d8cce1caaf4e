"""The steps of the pipeline. The command line, a container and a Kubeflow component all call these same functions.

Arguments are plain strings and lists, so that every caller can pass them; what a step makes lies in ``out``. A step's
module is imported when the step is first asked for: PyTorch and scipy take seconds, and most steps need only some.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svip.steps.comparing import compare
    from svip.steps.data import embed_attributes, prepare_data, push_bundle
    from svip.steps.model import evaluate, figures, import_checkpoint, predict, report
    from svip.steps.registry import register
    from svip.steps.reruns import rerun
    from svip.steps.runs import close_run, data_settings, open_run
    from svip.steps.sweeps import ablate, ablate_table, plan_ablation, sensitivity
    from svip.steps.training import train
    from svip.steps.tuning import plan_tuning, tune, tune_worker, tuning_dashboard, tuning_report

MODULES = {
    "runs": ("open_run", "data_settings", "close_run"),
    "data": ("prepare_data", "push_bundle", "embed_attributes"),
    "training": ("train",),
    "model": ("import_checkpoint", "evaluate", "report", "figures", "predict"),
    "reruns": ("rerun",),
    "registry": ("register",),
    "comparing": ("compare",),
    "sweeps": ("ablate", "sensitivity", "plan_ablation", "ablate_table"),
    "tuning": ("tune", "plan_tuning", "tune_worker", "tuning_report", "tuning_dashboard"),
}
"""Module -> its steps."""
__all__ = [
    "ablate",
    "ablate_table",
    "close_run",
    "compare",
    "data_settings",
    "embed_attributes",
    "evaluate",
    "figures",
    "import_checkpoint",
    "open_run",
    "plan_ablation",
    "plan_tuning",
    "predict",
    "prepare_data",
    "push_bundle",
    "register",
    "report",
    "rerun",
    "sensitivity",
    "train",
    "tune",
    "tune_worker",
    "tuning_dashboard",
    "tuning_report",
]


def __getattr__(name: str) -> Any:
    for module, steps in MODULES.items():
        if name in steps:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
