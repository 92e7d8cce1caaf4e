"""Write a pipeline as the YAML file that Kubeflow Pipelines takes, with what a cluster has for each of its tasks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from kfp import dsl
from kfp.compiler import Compiler
from kfp.dsl.pipeline_context import Pipeline

from pipelines.catalog import PipelineError, find_pipeline
from pipelines.settings import Cluster

RETRY_UNTIL = f"{30 * 24 * 3600}s"
"""A step is tried again until this long after its first start; kfp says an hour, less than many a training takes."""


def compile_pipeline(
    name: str, out: Path, cluster: Cluster | None = None, parameters: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Compile to ``out``; the steps in an order in which they may run, each with its image.

    ``parameters`` become the defaults of the pipeline's own. With a ``cluster`` the file has a second YAML document,
    which local runners do without. Errors are those of ``find_pipeline``.
    """
    values = dict(parameters or {})
    pipeline = find_pipeline(name, values)
    if cluster:
        pipeline = with_settings(pipeline, cluster)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.stem}.part.yaml")  # the compiler looks at the suffix
    Compiler().compile(pipeline, str(part), pipeline_parameters=values or None)
    part.replace(out)
    spec = next(yaml.safe_load_all(out.read_text(encoding="utf-8")))
    return dict(_steps(spec, spec["root"]))


def _steps(spec: Mapping[str, Any], component: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and image of each task of a component that is a graph, those of graphs within among them."""
    tasks = component["dag"]["tasks"]
    order = TopologicalSorter({name: task.get("dependentTasks", ()) for name, task in tasks.items()})
    for name in order.static_order():
        inner = spec["components"][tasks[name]["componentRef"]["name"]]
        if "dag" in inner:
            yield from _steps(spec, inner)
        else:
            yield name, spec["deploymentSpec"]["executors"][inner["executorLabel"]]["container"]["image"]


def with_settings(pipeline: Any, cluster: Cluster) -> Any:
    """The same pipeline, with what the cluster has for each of its tasks."""
    source = pipeline.pipeline_func

    @functools.wraps(source)
    def configured(*arguments: Any) -> Any:
        outputs = source(*arguments)
        for task in Pipeline.get_default_pipeline().tasks.values():
            configure(task, task.component_spec.name.replace("-", "_"), cluster)
        return outputs

    return dsl.pipeline(name=pipeline.name, description=pipeline.description)(configured)


def configure(task: dsl.PipelineTask, name: str, cluster: Cluster) -> None:
    """Put the settings of component ``name`` on a task."""
    try:
        from kfp import kubernetes
    except ImportError:
        raise PipelineError("what a cluster has is compiled by kfp-kubernetes: pip install 'svip[cluster]'") from None
    step = cluster.step(name)
    pod = cluster.step("default") if cluster.watches(name) else step  # what it takes to run; its nodes have their own
    if cluster.image:
        task.set_container_image(cluster.image)
    if pod.cpu:
        task.set_cpu_request(pod.cpu)
    if pod.memory:
        task.set_memory_request(pod.memory).set_memory_limit(pod.memory)
    if pod.gpus and not cluster.watches(name):
        task.set_accelerator_type(pod.gpu_type).set_accelerator_limit(pod.gpus)
    if step.retries:
        task.set_retry(step.retries, f"{step.retry_pause}s", backoff_factor=2.0, backoff_max_duration=RETRY_UNTIL)
    if not step.cache:
        task.set_caching_options(False)
    for variable, value in cluster.environment(name).items():
        task.set_env_variable(variable, value)
    if cluster.watches(name):  # the label of its TrainJob, by which close_run finds it
        kubernetes.use_field_path_as_env(task, "SVIP_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    for secret, keys in step.secrets.items():
        if keys:
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys})
    for claim, folder in step.volumes.items():
        if folder:
            kubernetes.mount_pvc(task, claim, folder)
    if pod.shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=pod.shm)
    for label, wanted in pod.node_selector.items():
        if wanted is not None:
            kubernetes.add_node_selector(task, label, wanted)
    for taint in pod.tolerations:
        kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect, taint.seconds)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.image_pull_secrets)
