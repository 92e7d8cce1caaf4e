"""plan_tuning: start a study for several workers."""

from typing import List

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_tuning(
    bundle: Input[Dataset],
    vectors: Input[Dataset],
    preset: str,
    overrides: List[str],
    space: str,
    trials: int,
    workers: int,
    parent_run_id: str,
    study: Output[Artifact],
) -> List[str]:
    """Check the search space and have the study's trials wait; the names of the workers."""
    from svip import steps

    return steps.plan_tuning(
        bundle.path, vectors.path, study.path, preset, space, trials, workers, overrides, parent_run_id
    )
