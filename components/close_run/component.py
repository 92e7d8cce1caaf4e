"""close_run: end the MLflow run of a pipeline as the pipeline ended."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def close_run(pipeline: str, job: str, status: dsl.PipelineTaskFinalStatus):
    """End the parent run of this job; an exit handler can't receive its id, but it knows the name."""
    from svip import steps

    steps.close_run(f"{pipeline}-{job}", status.state)
