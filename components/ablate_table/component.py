"""ablate_table: Table 2 from the evaluations of an ablation's runs."""

from typing import List

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ablate_table(
    evaluations: Input[List[Artifact]],
    runs: List[str],
    preset: str,
    overrides: List[str],
    parent_run_id: str,
    files: Output[Artifact],
    page: Output[HTML],
):
    """Write the table's files, and its page once more as the artifact that Kubeflow shows."""
    import shutil

    from svip import steps

    paths = [evaluation.path for evaluation in evaluations]
    shutil.copyfile(steps.ablate_table(paths, files.path, runs, preset, overrides, parent_run_id), page.path)
