"""open_run: start the MLflow run that all steps of a pipeline belong to."""

from typing import List

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def open_run(pipeline: str, job: str, preset: str, overrides: List[str], continues: str = "") -> str:
    """Start the parent run, tagged with the pipeline and its job, or open that of a job it continues; its id."""
    from svip import steps

    return steps.open_run(
        f"{pipeline}-{job}", preset, overrides, " ".join(f"{pipeline}-{one}" for one in continues.split())
    )
