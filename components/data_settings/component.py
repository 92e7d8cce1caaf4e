"""data_settings: what of a configuration the bundle and the vectors depend on."""

from typing import List

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def data_settings(preset: str, overrides: List[str]) -> List[str]:
    """Every value of ``data.*`` and ``semantics.*``, as overrides."""
    from svip import steps

    return steps.data_settings(preset, overrides)
