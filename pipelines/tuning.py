"""Tuning: many trials on the validation classes, then one training with the best values and one evaluation."""

from typing import List

from kfp import dsl

from components.close_run.component import close_run
from components.data_settings.component import data_settings
from components.embed_attributes.component import embed_attributes
from components.evaluate.component import evaluate
from components.open_run.component import open_run
from components.plan_tuning.component import plan_tuning
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.train.component import train
from components.tune.component import tune
from components.tuning_report.component import tuning_report


@dsl.pipeline(name="tuning", description="Tune on the validation classes, then train and test once with the best.")
def tuning(
    preset: str = "smoke",
    overrides: List[str] = [],  # noqa: B006 (kfp wants the default here)
    space: str = "",
    trials: int = 10,
    workers: int = 2,
    continues: str = "",
):
    """As ``experiment``, with the best of ``trials`` in ``space`` (empty: the preset's, else paper)."""
    job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    closing = close_run(pipeline="tuning", job=job).set_caching_options(False)
    with dsl.ExitHandler(closing, name="steps"):
        run = open_run(pipeline="tuning", job=job, preset=preset, overrides=overrides, continues=continues)
        run.set_caching_options(False)
        settings = data_settings(preset=preset, overrides=overrides).set_caching_options(False).after(run)
        data = {"preset": "smoke", "overrides": settings.output}  # as in experiment
        bundle = prepare_data(**data).outputs["bundle"]
        vectors = embed_attributes(bundle=bundle, **data).outputs["vectors"]
        plan = plan_tuning(
            bundle=bundle,
            vectors=vectors,
            preset=preset,
            overrides=overrides,
            space=space,
            trials=trials,
            workers=workers,
            parent_run_id=run.output,
        ).set_caching_options(False)
        study = plan.outputs["study"]
        # which worker does what is settled in the study's storage, not here
        with dsl.ParallelFor(plan.outputs["Output"], name="workers") as worker:
            done = tune(study=study, bundle=bundle, vectors=vectors, worker=worker).set_caching_options(False)
        found = tuning_report(
            study=study, trials=dsl.Collected(done.output), overrides=overrides, parent_run_id=run.output
        ).set_caching_options(False)
        checkpoint = train(
            bundle=bundle,
            vectors=vectors,
            preset=preset,
            overrides=found.outputs["Output"],
            parent_run_id=run.output,
        ).outputs["checkpoint"]
        evaluation = evaluate(checkpoint=checkpoint, bundle=bundle, parent_run_id=run.output).outputs["evaluation"]
        report(evaluation=evaluation, checkpoint=checkpoint, bundle=bundle, parent_run_id=run.output)
