"""The experiment: from data to a report, framed by one MLflow run."""

from typing import List

from kfp import dsl

from components.close_run.component import close_run
from components.data_settings.component import data_settings
from components.embed_attributes.component import embed_attributes
from components.evaluate.component import evaluate
from components.open_run.component import open_run
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.train.component import train


@dsl.pipeline(name="experiment", description="Prepare data, embed attributes, train, evaluate and report.")
def experiment(
    preset: str = "smoke",
    overrides: List[str] = [],  # noqa: B006 (kfp wants the default here)
    continues: str = "",
):
    """``preset`` and ``overrides`` as in ``svip.config.load_config``; ``continues``: the runs that it goes on with."""
    job = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    closing = close_run(pipeline="experiment", job=job).set_caching_options(False)
    with dsl.ExitHandler(closing, name="steps"):
        run = open_run(pipeline="experiment", job=job, preset=preset, overrides=overrides, continues=continues)
        run.set_caching_options(False)
        settings = data_settings(preset=preset, overrides=overrides).set_caching_options(False).after(run)
        # the settings are whole, so of this preset nothing is left: what has the same data has the same inputs
        data = {"preset": "smoke", "overrides": settings.output}
        bundle = prepare_data(**data).outputs["bundle"]
        vectors = embed_attributes(bundle=bundle, **data).outputs["vectors"]
        checkpoint = train(
            bundle=bundle, vectors=vectors, preset=preset, overrides=overrides, parent_run_id=run.output
        ).outputs["checkpoint"]
        evaluation = evaluate(checkpoint=checkpoint, bundle=bundle, parent_run_id=run.output).outputs["evaluation"]
        report(evaluation=evaluation, checkpoint=checkpoint, bundle=bundle, parent_run_id=run.output)
