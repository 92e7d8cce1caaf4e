"""Steps that make what training reads: the split bundle and the attribute vectors. They go without PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svip.config import load_config
from svip.data.bundle_cache import check_bucket, make_in_bucket, open_bundle
from svip.data.bundle_cache import push_bundle as upload
from svip.data.prepare import plan_bundle
from svip.data.sources import is_remote
from svip.semantics.attributes import attribute_phrases, read_rules, shipped_rules
from svip.semantics.vectors import embed_attributes as look_up
from svip.semantics.vectors import write_embedding
from svip.steps.inputs import check_made_with

log = logging.getLogger(__name__)


def prepare_data(out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Make the split bundle in ``out``; the content of its bundle.json.

    ``out``: a folder, or s3://bucket/prefix, for which the bundle is made in the cache of this machine and uploaded,
    unless the bucket has it. DataError for a http(s):// address.
    """
    if is_remote(out):
        check_bucket(out)
    plan = plan_bundle(load_config(preset, overrides))
    info = make_in_bucket(plan, out) if is_remote(out) else plan.make(Path(out)).info
    log.info("bundle %s: %s", info["sha256"][:12], _sentence(info["counts"]["images"]))
    return dict(info)


def push_bundle(bundle: str, to: str) -> str:
    """Upload a bundle to s3://bucket/prefix, from where every step takes it; its sha256."""
    check_bucket(to)
    data = open_bundle(bundle)
    upload(data, to)
    return data.sha256


def embed_attributes(bundle: str, out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look up the attributes' word vectors and write vectors.npy [A, V] and report.json to ``out``; the report.

    ValueError for the preset of another data set than the bundle's.
    """
    config = load_config(preset, overrides)
    data = open_bundle(bundle)
    check_made_with({"dataset": data.info["dataset"]}, config, preset, bundle)
    names = data.attribute_names
    vectors = config.semantics.vectors or str(data.path / "word_vectors.txt")
    if config.semantics.vectors is None and not Path(vectors).exists():
        raise FileNotFoundError(
            f"semantics.vectors is not set and {bundle} brings no word vectors; give some, such as a file of GloVe "
            "(--vectors glove.6B.300d.txt)"
        )
    own_rules = config.semantics.phrases
    rules = read_rules(Path(own_rules)) if own_rules else shipped_rules(data.info["dataset"])
    phrases = attribute_phrases(names, rules)
    embedding = look_up(phrases, names, vectors, config.semantics.pooling, config.semantics.allow_missing)
    write_embedding(embedding, Path(out))
    missing = embedding.report["missing_words"]
    log.info("%d attribute vectors of size %d", *embedding.vectors.shape)
    if missing:
        log.warning("%d words are not in %s: %s", len(missing), embedding.report["vectors_file"], ", ".join(missing))
    return dict(embedding.report)


def _sentence(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items())
