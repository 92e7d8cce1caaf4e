"""A compiled pipeline, read strictly: every field is known, and every reference leads somewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineDeploymentConfig, PipelineSpec, PlatformSpec

Tree = dict[str, Any]


def read_strictly(path: Path) -> tuple[Tree, Tree]:
    """The documents of a compiled file (the second may be empty); an error for a field that Kubeflow does not know."""
    spec, *others = yaml.safe_load_all(path.read_text())
    json_format.ParseDict(spec, PipelineSpec(), ignore_unknown_fields=False)
    json_format.ParseDict(spec["deploymentSpec"], PipelineDeploymentConfig(), ignore_unknown_fields=False)
    platform = others[0] if others else {}
    assert len(others) <= 1
    json_format.ParseDict(platform, PlatformSpec(), ignore_unknown_fields=False)
    for executor in executors_of(platform).values():
        json_format.ParseDict(executor, KubernetesExecutorConfig(), ignore_unknown_fields=False)
    return spec, platform


def executors_of(platform: Tree) -> Tree:
    """Executor -> what Kubernetes is told of it."""
    assert set(platform.get("platforms", {})) <= {"kubernetes"}
    found = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    assert isinstance(found, dict)
    return found


def dangling(spec: Tree, platform: Tree) -> list[str]:
    """References that lead nowhere, and inputs that are wanted and not given; empty for a good pipeline."""
    components = spec["components"]
    executors = spec["deploymentSpec"]["executors"]
    problems = [
        f"{name}: no executor {component['executorLabel']}"
        for name, component in components.items()
        if "dag" not in component and component["executorLabel"] not in executors
    ]
    problems += [f"platform: no executor {name}" for name in executors_of(platform) if name not in executors]
    for name, owner in {"root": spec["root"], **components}.items():
        for task, problem in _problems(owner, components) if "dag" in owner else ():
            problems.append(f"{name}/{task}: {problem}")
    return problems


def _problems(owner: Tree, components: Mapping[str, Tree]) -> Iterator[tuple[str, str]]:
    tasks = owner["dag"]["tasks"]
    for name, task in tasks.items():
        component = components.get(task["componentRef"]["name"])
        if component is None:
            yield name, f"no component {task['componentRef']['name']}"
            continue
        given = set()
        for kind in ("parameters", "artifacts"):
            wanted = component.get("inputDefinitions", {}).get(kind, {})
            for key, source in task.get("inputs", {}).get(kind, {}).items():
                given.add(key)
                if key not in wanted and "parameterIterator" not in task:
                    yield name, f"{task['componentRef']['name']} has no input {key}"
                yield from ((name, problem) for problem in _source(kind, key, source, owner, tasks, task, components))
        iterator = task.get("parameterIterator")
        if iterator:
            given.add(iterator["itemInput"])
            if iterator["items"].get("inputParameter") not in {None, *task["inputs"]["parameters"]}:
                yield name, f"iterates over {iterator['items']}, which it is not given"
        for kind in ("parameters", "artifacts"):
            for key, wanted in component.get("inputDefinitions", {}).get(kind, {}).items():
                if key not in given and not wanted.get("isOptional") and "defaultValue" not in wanted:
                    yield name, f"is not given {key}"
        for other in task.get("dependentTasks", []):
            if other not in tasks:
                yield name, f"waits for {other}, which is not there"
    for kind, selectors, producer, output in (
        ("artifacts", "artifactSelectors", "producerSubtask", "outputArtifactKey"),
        ("parameters", "valueFromParameter", "producerSubtask", "outputParameterKey"),
    ):
        for key, source in owner["dag"].get("outputs", {}).get(kind, {}).items():
            found = source.get(selectors, [])
            for selector in found if isinstance(found, list) else [found]:
                made = _outputs(kind, tasks.get(selector[producer]), components)
                if selector[output] not in made:
                    yield f"output {key}", f"{selector[producer]} makes no {selector[output]}"


def _source(
    kind: str, key: str, source: Tree, owner: Tree, tasks: Tree, task: Tree, components: Mapping[str, Tree]
) -> Iterator[str]:
    """What is wrong with where one input comes from."""
    ((way, value),) = ((way, value) for way, value in source.items() if way != "parameterExpressionSelector")
    if way in ("componentInputParameter", "componentInputArtifact"):
        if value not in owner.get("inputDefinitions", {}).get(kind, {}):
            yield f"{key} comes from {value}, which is no input here"
    elif way in ("taskOutputParameter", "taskOutputArtifact"):
        output = value["outputParameterKey" if kind == "parameters" else "outputArtifactKey"]
        if output not in _outputs(kind, tasks.get(value["producerTask"]), components):
            yield f"{key} comes from {value['producerTask']}.{output}, which is not made"
        if value["producerTask"] not in task.get("dependentTasks", []):
            yield f"does not wait for {value['producerTask']}, whose {output} it takes"
    elif way == "taskFinalStatus":
        if value["producerTask"] not in tasks:
            yield f"{key} is the status of {value['producerTask']}, which is not there"
    elif way != "runtimeValue":
        yield f"{key} comes from an unknown {way}"


def _outputs(kind: str, task: Tree | None, components: Mapping[str, Tree]) -> set[str]:
    component = components.get(task["componentRef"]["name"], {}) if task else {}
    return set(component.get("outputDefinitions", {}).get(kind, {}))
