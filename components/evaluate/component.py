"""evaluate: T1, U, S and H of a checkpoint on the test images, by every protocol."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    checkpoint: Input[Model],
    bundle: Input[Dataset],
    parent_run_id: str,
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    results: Output[Markdown],
    run: str = "",
):
    """Write what evaluation found; the accuracies (percent) become metrics, and a table for Kubeflow to show."""
    import shutil

    from svip import steps

    result = steps.evaluate(checkpoint.path, bundle.path, evaluation.path, parent_run_id, run)
    for protocol, numbers in result["protocols"].items():
        for name, value in numbers.items():
            metrics.log_metric(f"{protocol}/{name}", value)
    shutil.copyfile(f"{evaluation.path}/metrics.json", metrics.path)
    shutil.copyfile(f"{evaluation.path}/results.md", results.path)
