"""train: choose epoch and gamma on the validation classes, then train the model to keep."""

from typing import List

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    bundle: Input[Dataset],
    vectors: Input[Dataset],
    preset: str,
    overrides: List[str],
    parent_run_id: str,
    checkpoint: Output[Model],
    metrics: Output[Metrics],
    run: str = "",
):
    """Write the checkpoint directory; what was reached on the validation classes becomes metrics."""
    import shutil

    from svip import steps

    result = steps.train(
        bundle.path, vectors.path, checkpoint.path, preset, overrides, parent_run_id, run=run, log_model=not run
    )
    checkpoint.metadata["run_id"] = result.pop("run_id")
    for name, value in result.items():
        metrics.log_metric(name, value)
    shutil.copyfile(f"{checkpoint.path}/model.json", metrics.path)
