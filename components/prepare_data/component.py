"""prepare_data: from the original archives (or nothing, for synthetic) to a split bundle."""

from typing import List

from kfp import dsl
from kfp.dsl import Dataset, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_data(preset: str, overrides: List[str], bundle: Output[Dataset]):
    """Write the split bundle; its content hash and counts become metadata."""
    from svip import steps

    info = steps.prepare_data(bundle.path, preset, overrides)
    bundle.metadata.update({key: info[key] for key in ("dataset", "sha256", "counts")})
