"""What a training starts from: a bundle and its attribute vectors, checked against the configuration."""

from __future__ import annotations

from svip.config import Config
from svip.data.bundle import Bundle
from svip.data.bundle_cache import open_bundle
from svip.semantics.vectors import Embedding, open_embedding


def open_inputs(config: Config, preset: str, bundle: str, vectors: str) -> tuple[Bundle, Embedding]:
    """Both, if the bundle was made with this configuration and the vectors for its attributes. Else ValueError."""
    data, embedding = open_bundle(bundle), open_embedding(vectors)
    made_with = {name: data.info[name] for name in ("dataset", "split", "fold")} | data.info.get("settings", {})
    for name in sorted(made_with.keys() - {"allow_missing"}):  # what is saved has to be what ran
        if getattr(config.data, name) != made_with[name]:
            raise ValueError(
                f"data.{name}={getattr(config.data, name)} (preset {preset}), but the bundle {bundle} has "
                f"{made_with[name]}; use the preset that it was made with, or override data.{name}={made_with[name]}"
            )
    if embedding.names != data.attribute_names:
        raise ValueError(f"{vectors} was made for other attributes than those of {bundle}; run embed-attributes again")
    return data, embedding
