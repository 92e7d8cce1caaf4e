"""Registered models: versions of trained models, of which one is the champion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svip.tracking.store import client_of, reaching_the_store, tracking_uri, use_store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
"""The version to use, and the latest one that has not beaten it: ``models:/NAME@champion``."""
EVALUATION_TAG = "evaluation_run_id"
"""Of a version: the run that tested it."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    run_id: str
    """Of the training."""
    tags: Mapping[str, str]


@reaching_the_store()
def champion_of(name: str) -> Version | None:
    """The champion of a registered model, if there is one."""
    client = client_of(tracking_uri())
    found = client.search_registered_models(f"name = '{name}'")
    number = (found[0].aliases or {}).get(CHAMPION) if found else None
    return _version(client.get_model_version(name, str(number))) if number else None


@reaching_the_store()
def version_of(name: str, run_id: str) -> Version | None:
    """The version of a registered model that a training made, if there is one."""
    found = client_of(tracking_uri()).search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return _version(found[0]) if found else None


@reaching_the_store()
def model_status(model_id: str) -> str:
    """READY, or what MLflow says of a logged model whose files are not all there."""
    return str(client_of(tracking_uri()).get_logged_model(model_id).status)


@reaching_the_store()
def register_version(name: str, model_id: str, run_id: str) -> Version:
    """Make the model that a training logged the next version of a registered model."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    client = client_of(tracking_uri())
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    use_store(client)  # create_model_version looks the model up there
    version = _version(client.create_model_version(name, f"models:/{model_id}", run_id, model_id=model_id))
    # so that the model's own page knows of its versions, as after mlflow.register_model
    versions = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    versions.append({"name": name, "version": version.number})
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})
    return version


@reaching_the_store()
def describe(version: Version, tags: Mapping[str, str], description: str) -> None:
    """Set what the registry's pages say of a version."""
    client = client_of(tracking_uri())
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.number, key, value)
    client.update_model_version(version.name, version.number, description)


@reaching_the_store()
def set_alias(version: Version, alias: str) -> None:
    """Point an alias at a version; a champion is no challenger any more."""
    client = client_of(tracking_uri())
    client.set_registered_model_alias(version.name, alias, version.number)
    aliases = client.get_registered_model(version.name).aliases or {}
    if alias == CHAMPION and str(aliases.get(CHALLENGER)) == version.number:
        client.delete_registered_model_alias(version.name, CHALLENGER)


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str(found.version), found.run_id or "", dict(found.tags))
