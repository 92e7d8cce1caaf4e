"""What the runs of training and evaluation say of where they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from svip import tracking
from svip.config import Config, to_yaml
from svip.data.bundle import Bundle
from svip.data.sources import is_remote, shown
from svip.evaluation.inference import choose_device
from svip.semantics.vectors import Embedding, read_embedding


def lineage_tags(config: Config, data: Bundle, bundle: str) -> dict[str, str]:
    """Tags of a run on the bundle ``data`` that was opened at the address ``bundle``."""
    return {
        "bundle": _place(bundle),
        "bundle_sha256": data.sha256,
        "protocol": "validation" if config.train.select else "none",
    }


def used_data(data: Bundle, bundle: str, context: str) -> tracking.Data:
    """The bundle as MLflow lists it."""
    name = f"{data.info['dataset']}-{data.info['split']}"
    return tracking.Data(name, data.sha256, _place(bundle), context, data.info["counts"])


def record_lineage(tracker: tracking.Tracker, config: Config, data: Bundle, bundle: str, vectors: str = "") -> None:
    """Log what the run can be done again from; with ``vectors`` it is a training, else an evaluation."""
    used = [used_data(data, bundle, "training" if vectors else "testing")]
    if vectors:
        embedding = read_embedding(vectors)
        digest = vectors_sha256(embedding)
        tracker.set_tags({"vectors_sha256": digest})
        used.append(
            tracking.Data(
                name="attribute-vectors",
                sha256=digest,
                address=_place(vectors),
                context="word vectors",
                profile={"attributes": len(embedding.vectors), "size": embedding.vectors.shape[1]},
            )
        )
    device = str(choose_device(config.train.device))
    tracking.log_lineage(tracker, to_yaml(config), device, Path(vectors) if vectors else None)
    tracking.log_data(tracker, used)


def vectors_sha256(embedding: Embedding) -> str:
    """What tells attribute vectors apart, as training notes it in its folder too."""
    return hashlib.sha256(embedding.vectors.tobytes()).hexdigest()


def _place(address: str) -> str:
    """An address as another process finds it, without a password."""
    return shown(address) if is_remote(address) else str(Path(address).resolve())
