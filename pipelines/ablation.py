"""The ablation: variants of the paper's Table 2 with several seeds, side by side, and their table."""

from typing import List

from kfp import dsl

from components.ablate_table.component import ablate_table
from components.close_run.component import close_run
from components.data_settings.component import data_settings
from components.embed_attributes.component import embed_attributes
from components.evaluate.component import evaluate
from components.open_run.component import open_run
from components.plan_ablation.component import plan_ablation
from components.prepare_data.component import prepare_data
from components.train.component import train


@dsl.pipeline(name="ablation", description="Train and evaluate variants of Table 2 with several seeds; their table.")
def ablation(
    preset: str = "smoke",
    overrides: List[str] = [],  # noqa: B006 (kfp wants the default here)
    variants: List[str] = ["baseline", "full"],  # noqa: B006
    seeds: int = 1,
    continues: str = "",
):
    """As ``experiment``, for each of ``variants`` (``["all"]``: of Table 2) with each of so many seeds."""
    job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    closing = close_run(pipeline="ablation", job=job).set_caching_options(False)
    with dsl.ExitHandler(closing, name="steps"):
        runs = plan_ablation(variants=variants, seeds=seeds)
        parent = open_run(pipeline="ablation", job=job, preset=preset, overrides=overrides, continues=continues)
        parent.set_caching_options(False).after(runs)
        settings = data_settings(preset=preset, overrides=overrides).set_caching_options(False).after(parent)
        data = {"preset": "smoke", "overrides": settings.output}  # as in experiment
        bundle = prepare_data(**data).outputs["bundle"]
        vectors = embed_attributes(bundle=bundle, **data).outputs["vectors"]
        # one loop over strings: kfp.local runs no loop in a loop
        with dsl.ParallelFor(runs.output, name="runs") as run:
            checkpoint = train(
                bundle=bundle,
                vectors=vectors,
                preset=preset,
                overrides=overrides,
                parent_run_id=parent.output,
                run=run,
            ).outputs["checkpoint"]
            evaluation = evaluate(checkpoint=checkpoint, bundle=bundle, parent_run_id=parent.output, run=run).outputs[
                "evaluation"
            ]
        ablate_table(
            evaluations=dsl.Collected(evaluation),
            runs=runs.output,
            preset=preset,
            overrides=overrides,
            parent_run_id=parent.output,
        )
