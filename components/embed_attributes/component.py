"""embed_attributes: one word vector for each attribute of a bundle."""

from typing import List

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def embed_attributes(bundle: Input[Dataset], preset: str, overrides: List[str], vectors: Output[Dataset]):
    """Write the attribute vectors and the report on words that have none."""
    from svip import steps

    steps.embed_attributes(bundle.path, vectors.path, preset, overrides)
