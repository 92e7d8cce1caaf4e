"""embed_attributes: one word vector for each attribute of a bundle."""

from typing import List

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def embed_attributes(
    bundle: Input[Dataset], preset: str, overrides: List[str], vectors: Output[Dataset], words: Output[Markdown]
):
    """Write the attribute vectors, and the report on words that have none for Kubeflow to show."""
    import shutil

    from svip import steps

    report = steps.embed_attributes(bundle.path, vectors.path, preset, overrides)
    vectors.metadata.update({key: report[key] for key in ("vectors_file", "dimension", "pooling")})
    shutil.copyfile(f"{vectors.path}/report.md", words.path)
