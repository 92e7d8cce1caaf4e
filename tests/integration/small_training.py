"""What the tests of training share: a bundle and a configuration with which a whole training takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from svip.data.bundle import Bundle, BundleWriter
from svip.semantics.vectors import Embedding, write_embedding

SIZE, ATTRIBUTES = 16, 6
CLASS_ROLES = ["train"] * 4 + ["val_unseen"] * 2 + ["test_unseen"] * 2
IMAGE_ROLES = {
    "train": ["train"] * 5 + ["val_seen", "test_seen"],
    "val_unseen": ["val_unseen"] * 3 + ["test_seen"],
    "test_unseen": ["test_unseen"] * 3,
}
"""Class role -> roles of the images of each of its classes, for ``write_bundle``."""
TINY = [
    "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    "model.selected_groups=2",
    "model.hidden=8",
    f"data.image_size={SIZE}",
    "data.train_view=random_crop",
    "data.flip=true",
    "optim.batch_size=4",
    "optim.epochs=3",
    "train.device=cpu",
]


def write_bundle(path: Path, image_roles: Mapping[str, Sequence[str]], other_tests: bool = False) -> Bundle:
    """Eight classes of noise around a colour, each with an image of each of its class role's ``image_roles``.

    ``other_tests``: nothing that belongs to testing is the same.
    """
    random, strange = np.random.default_rng(0), np.random.default_rng(1)
    matrix = random.random((len(CLASS_ROLES), ATTRIBUTES))
    with BundleWriter(path) as writer:
        for class_id, class_role in enumerate(CLASS_ROLES):
            for index, role in enumerate(image_roles[class_role]):
                colour = np.array([class_id % 2, class_id // 2 % 2, class_id // 4]) * 180
                image = np.clip(colour + random.normal(40, 20, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
                if other_tests and role.startswith("test"):
                    image = strange.integers(0, 256, image.shape, dtype=np.uint8)
                writer.add(f"{class_id}/{index}.png", class_id, role, image)
            if other_tests and class_role == "test_unseen":
                matrix[class_id] = np.nan
        names = pd.DataFrame({"name": [f"class {i}" for i in range(len(CLASS_ROLES))], "role": CLASS_ROLES})
        attributes = pd.DataFrame(matrix, columns=[f"has::{i}" for i in range(ATTRIBUTES)])
        info = {"dataset": "synthetic", "split": "standard", "fold": 1}
        return writer.finish(pd.concat([names, attributes], axis=1), info)


def write_vectors(folder: Path, bundle: Bundle, seed: int = 1) -> Path:
    """Random attribute vectors for a bundle, as ``svip embed-attributes`` leaves them."""
    vectors = np.random.default_rng(seed).normal(size=(len(bundle.attribute_names), 7)).astype(np.float32)
    write_embedding(Embedding(vectors, bundle.attribute_names, {}), folder)
    return folder
