"""What the runs of training and evaluation say of where they come from."""

from __future__ import annotations

import functools
from pathlib import Path

from svip import tracking
from svip.config import Config, to_yaml
from svip.data.bundle import Bundle
from svip.data.sources import is_remote, shown
from svip.evaluation.inference import choose_device
from svip.semantics.vectors import Embedding, vectors_sha256, write_embedding


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


def record_lineage(
    tracker: tracking.Tracker,
    config: Config,
    data: Bundle,
    bundle: str,
    embedding: Embedding | None = None,
    vectors: str = "",
) -> None:
    """Log what the run can be done again from: a training's, with the attribute vectors that lie at ``vectors``.

    Without vectors it is an evaluation's.
    """
    if not tracker.run_id:
        return
    used = [used_data(data, bundle, "training" if embedding else "testing")]
    if embedding:
        digest, (attributes, size) = vectors_sha256(embedding.vectors), embedding.vectors.shape
        tracker.set_tags({"vectors_sha256": digest})
        profile = {"attributes": attributes, "size": size}
        used.append(tracking.Data("attribute-vectors", digest, _place(vectors), "word vectors", profile))
    write = functools.partial(write_embedding, embedding) if embedding else None
    tracking.log_lineage(tracker, to_yaml(config), str(choose_device(config.train.device)), write)
    tracking.log_data(tracker, used)


def _place(address: str) -> str:
    """An address as another process finds it, without a password."""
    return shown(address) if is_remote(address) else str(Path(address).resolve())
