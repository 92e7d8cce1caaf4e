"""report: one HTML page and a table from what evaluation wrote."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    evaluation: Input[Artifact],
    checkpoint: Input[Model],
    bundle: Input[Dataset],
    parent_run_id: str,
    files: Output[Artifact],
    page: Output[HTML],
):
    """Write the report's files, and the page once more as the artifact that Kubeflow shows."""
    import shutil

    from svip import steps

    shutil.copyfile(steps.report(evaluation.path, checkpoint.path, bundle.path, files.path, parent_run_id), page.path)
