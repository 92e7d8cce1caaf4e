"""plan_ablation: which runs an ablation has."""

from typing import List

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_ablation(variants: List[str], seeds: int) -> List[str]:
    """Check the variants; the names of all runs."""
    from svip import steps

    return steps.plan_ablation(variants, seeds)
