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
    from svip.steps.model import evaluate, figures, import_checkpoint, predict, report, train
    from svip.steps.runs import close_run, open_run
    from svip.steps.sweeps import ablate, ablate_table, plan_ablation, sensitivity

MODULES = {
    "runs": ("open_run", "close_run"),
    "data": ("prepare_data", "push_bundle", "embed_attributes"),
    "model": ("train", "import_checkpoint", "evaluate", "report", "figures", "predict"),
    "comparing": ("compare",),
    "sweeps": ("ablate", "sensitivity", "plan_ablation", "ablate_table"),
}
"""Module -> its steps."""
__all__ = [
    "ablate",
    "ablate_table",
    "close_run",
    "compare",
    "embed_attributes",
    "evaluate",
    "figures",
    "import_checkpoint",
    "open_run",
    "plan_ablation",
    "predict",
    "prepare_data",
    "push_bundle",
    "report",
    "sensitivity",
    "train",
]


def __getattr__(name: str) -> Any:
    for module, steps in MODULES.items():
        if name in steps:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
