"""tune: one worker of a study."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def tune(study: Input[Artifact], bundle: Input[Dataset], vectors: Input[Dataset], worker: str) -> int:
    """Train trials until the study is finished; how many ended well here."""
    from svip import steps

    print(f"{worker} begins")
    return steps.tune_worker(bundle.path, vectors.path, study.path)
