"""What a training starts from: a bundle and its attribute vectors, checked against the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svip.config import Config
from svip.data.bundle import Bundle
from svip.data.bundle_cache import open_bundle
from svip.semantics.vectors import Embedding, open_embedding


def open_inputs(config: Config, preset: str, bundle: str, vectors: str) -> tuple[Bundle, Embedding]:
    """Both, if the bundle was made with this configuration and the vectors for its attributes. Else ValueError."""
    data, embedding = open_bundle(bundle), open_embedding(vectors)
    made_with = {name: data.info[name] for name in ("dataset", "split", "fold")} | data.info.get("settings", {})
    made_with.pop("allow_missing", None)
    check_made_with(made_with, config, preset, bundle)  # what is saved has to be what ran
    if embedding.names != data.attribute_names:
        raise ValueError(f"{vectors} was made for other attributes than those of {bundle}; run embed-attributes again")
    return data, embedding


def check_made_with(made_with: Mapping[str, Any], config: Config, preset: str, bundle: str) -> None:
    """ValueError where the configuration's ``data`` is another than what a bundle was made with."""
    for name, value in sorted(made_with.items()):
        if getattr(config.data, name) != value:
            raise ValueError(
                f"data.{name}={getattr(config.data, name)} (preset {preset}), but the bundle {bundle} has {value}; "
                f"use the preset that it was made with, or override data.{name}={value}"
            )
