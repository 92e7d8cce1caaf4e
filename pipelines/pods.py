"""Logs of a run's steps, from the pods that Kubeflow ran them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.server import ServerError

CONTAINER = "main"
"""The step's own container, beside those of Kubeflow and Argo."""


def print_logs(namespace: str, run_id: str, say: Callable[[str], None], step: str = "", follow: bool = False) -> None:
    """Say the log of each pod of a run (of one ``step``: ``train``), the oldest first; ``follow`` stays until they end.

    Raises ServerError where no cluster can be reached, or no such pod is left.
    """
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    core = _connect()
    try:
        pods = core.list_namespaced_pod(namespace, label_selector=f"pipeline/runid={run_id}").items
        found = sorted(
            ((pod.metadata.creation_timestamp, pod.metadata.name, name) for pod in pods if (name := step_of(pod))),
        )
        wanted = [(pod, name) for _, pod, name in found if step in ("", name)]
        if not wanted:
            others = f"; there are: {', '.join(sorted({name for *_, name in found}))}" if found else ""
            raise ServerError(
                f"namespace {namespace} has no pod of {f'step {step} of ' if step else ''}run {run_id}{others}"
                f"{'' if found else '; Kubeflow removes them some time after the run: the UI may still have its logs'}"
            )
        for pod, name in wanted:
            say(f"== {name} ({pod})")
            try:
                log = core.read_namespaced_pod_log(
                    pod, namespace, container=CONTAINER, follow=follow, _preload_content=False
                )
                _say_lines(log, say)
            except client.ApiException as error:
                if error.status != 400:  # it waits for a node, or for its image
                    raise
                say("has not started yet")
    except ApiException as error:
        raise ServerError(f"Kubernetes answered {error.status} ({error.reason}) for namespace {namespace}") from error
    except HTTPError as error:
        raise ServerError(f"Kubernetes at {core.api_client.configuration.host} does not answer") from error


def step_of(pod: Any) -> str:
    """The component that a pod runs, by the function that Kubeflow's executor is told to call; "" for other pods."""
    for container in pod.spec.containers:
        words = [*(container.command or []), *(container.args or [])]
        if container.name == CONTAINER and "--function_to_execute" in words[:-1]:
            return str(words[words.index("--function_to_execute") + 1])
    return ""


def _connect() -> Any:
    """The cluster of the kubeconfig, or the one that this is a pod of."""
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException

    try:
        config.load_kube_config()
    except (ConfigException, TypeError) as error:  # the latter for an empty file
        try:
            config.load_incluster_config()
        except ConfigException:
            raise ServerError(
                f"logs are read from the cluster's pods, and no cluster is configured ({str(error).rstrip('.')}); "
                "set KUBECONFIG, or look at the run in the UI"
            ) from error
    return client.CoreV1Api()


def _say_lines(log: Any, say: Callable[[str], None]) -> None:
    rest = b""
    for piece in log.stream():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            say(line.decode(errors="replace"))
    if rest:
        say(rest.decode(errors="replace"))
