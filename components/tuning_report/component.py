"""tuning_report: what a study has found."""

from typing import List

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tuning_report(
    study: Input[Artifact],
    trials: List[int],
    overrides: List[str],
    parent_run_id: str,
    files: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> List[str]:
    """Write the table, figures and page; the best values as overrides, after those that were given."""
    import shutil

    from svip import steps

    print(f"trials by worker: {', '.join(f'{count:g}' for count in trials)}")
    result = steps.tuning_report(study.path, files.path, parent_run_id)
    shutil.copyfile(result["page"], page.path)
    metrics.log_metric("val/H", result["H"])
    return [*overrides, *result["overrides"]]
