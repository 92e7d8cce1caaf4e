"""evaluate: T1, U, S and H of a checkpoint on the test images, by every protocol."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    checkpoint: Input[Model],
    bundle: Input[Dataset],
    parent_run_id: str,
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    run: str = "",
):
    """Write metrics.json, per_class.csv and curve.csv; the accuracies (percent) become metrics."""
    from svip import steps

    result = steps.evaluate(checkpoint.path, bundle.path, evaluation.path, parent_run_id, run)
    for protocol, numbers in result["protocols"].items():
        for name, value in numbers.items():
            metrics.log_metric(f"{protocol}/{name}", value)
