"""What a cluster has to know to run the pipelines: a file such as ``infra/cluster.yaml``, read and checked."""

from __future__ import annotations

import difflib
import logging
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import components

log = logging.getLogger(__name__)

TRAINING_STEPS = ("train", "tune")
"""Steps that read how to train from the environment. Of them ``train`` alone knows nodes."""
WORK_STEPS = (*TRAINING_STEPS, "plan_tuning", "tuning_report")
"""Steps that find each other's files in ``training.work``."""
CPU = r"\d+(\.\d+)?m?"
MEMORY = r"\d+([KMGTPE]i?)?"
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


class SettingsError(ValueError):
    """A cluster file that can't be used; the message names the file and field, what was expected and what to do."""


@dataclass
class Toleration:
    key: str | None = None
    operator: str = "Equal"
    value: str | None = None
    effect: str | None = None
    seconds: int | None = None


@dataclass
class Step:
    """What the pod of one step gets; the comments of infra/cluster.yaml say what each value means."""

    cpu: str | None = None
    memory: str | None = None
    shm: str | None = None
    gpus: int | None = None
    gpu_type: str = "nvidia.com/gpu"
    node_selector: dict[str, str | None] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    env: dict[str, str | None] = field(default_factory=dict)
    secrets: dict[str, list[str] | None] = field(default_factory=dict)
    volumes: dict[str, str | None] = field(default_factory=dict)
    retries: int = 0
    retry_pause: int = 30
    cache: bool = True


@dataclass
class Training:
    nodes: int = 1
    processes: int | None = None
    work: str | None = None
    runtime: str = "svip"


@dataclass
class Cluster:
    """One cluster. ``steps`` has the ``default`` and, by component, what differs from it: see :meth:`step`."""

    image: str | None = None
    image_pull_secrets: list[str] = field(default_factory=list)
    host: str | None = None
    namespace: str = "svip"
    service_account: str | None = "svip-pipeline"
    pipeline_root: str | None = None
    training: Training = field(default_factory=Training)
    steps: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str) -> Step:
        """The settings of a component, such as ``prepare_data``, over the default's."""
        layers = [self.steps.get("default") or {}, self.steps.get(name) or {}]
        step = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Step), *layers))
        assert isinstance(step, Step)
        return step

    def has_tracking(self) -> bool:
        """Whether the steps are told an MLflow server; without one each pod would keep its runs to itself."""
        default, name = self.step("default"), "MLFLOW_TRACKING_URI"
        return bool(default.env.get(name)) or any(name in (keys or []) for keys in default.secrets.values())

    def watches(self, name: str) -> bool:
        """Whether the pod of this component only watches a TrainJob, whose nodes get what stands under its name."""
        return name == "train" and self.training.nodes > 1

    def environment(self, name: str) -> dict[str, str]:
        """Variables of a component's pod, those that ``training`` comes to among them."""
        step, ours = self.step(name), {}
        if name in WORK_STEPS and self.training.work:
            ours["SVIP_WORK"] = self.training.work
        if name in TRAINING_STEPS:
            ours["SVIP_PROCESSES"] = str(self.training.processes or step.gpus or 1)
        if name == "train":
            ours |= {
                "SVIP_GPU_TYPE": step.gpu_type,
                "SVIP_IMAGE": self.image or components.IMAGE,
                "SVIP_TRAINING_RUNTIME": self.training.runtime,
            }
        if name == "train" or (name == "close_run" and self.training.nodes > 1):  # which ends the TrainJob
            ours |= {"SVIP_NODES": str(self.training.nodes), "SVIP_NAMESPACE": self.namespace}
        if self.watches(name):
            ours |= {"SVIP_NODE_CPU": step.cpu or "", "SVIP_NODE_MEMORY": step.memory or ""}
            if step.gpus is not None:  # else one for each process, if it trains on GPUs
                ours["SVIP_NODE_GPUS"] = str(step.gpus)
        return {**ours, **{key: value for key, value in step.env.items() if value is not None}}


def load_cluster(path: Path) -> Cluster:
    """Read and check a cluster file; SettingsError names the field, with the nearest valid name for an unknown one."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise SettingsError(f"cluster file {path} does not exist; infra/cluster.yaml is one to copy") from None
    except Exception as error:  # YAML errors have no common base in OmegaConf
        raise SettingsError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: expected a mapping, found {type(loaded).__name__}")
    try:
        _refuse_unknown(loaded, Cluster)
        _refuse_unknown(loaded.get("training"), Training, "training.")
        steps = loaded.get("steps") or {}
        if not isinstance(steps, Mapping):
            raise SettingsError(f"steps: expected a mapping, found {type(steps).__name__}")
        _refuse_strangers(steps, ["default", *step_names()], "steps.")
        for name, step in steps.items():
            _refuse_unknown(step, Step, f"steps.{name}.")
        given = {key: value for key, value in loaded.items() if value is not None or key == "service_account"}
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), given))
        assert isinstance(cluster, Cluster)
        for name in steps:
            _check_step(name, cluster.step(name))
        _check_training(cluster)
    except OmegaConfBaseException as error:
        raise SettingsError(f"{path}: {getattr(error, 'full_key', None)}: {str(error).splitlines()[0]}") from error
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    if cluster.image and re.search(r"(^|/)[^/:@]+(:latest)?$", cluster.image):
        log.warning("image %s has no tag of its own: Kubeflow's cache can't tell its builds apart", cluster.image)
    return cluster


def step_names() -> list[str]:
    """All components, by the name of their folder."""
    return [module.name for module in pkgutil.iter_modules(components.__path__)]


def _refuse_unknown(tree: Any, node: type, prefix: str = "") -> None:
    if tree is None:
        return
    if not isinstance(tree, Mapping):
        raise SettingsError(f"{prefix.rstrip('.')}: expected a mapping, found {type(tree).__name__}")
    _refuse_strangers(tree, [item.name for item in fields(node)], prefix)


def _refuse_strangers(names: Iterable[Any], known: list[str], prefix: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise SettingsError(f"unknown key '{prefix}{name}'; {hint}")


def _check_training(cluster: Cluster) -> None:
    training = cluster.training
    for key, value in (("nodes", training.nodes), ("processes", training.processes)):
        if value is not None and value < 1:
            raise SettingsError(f"training.{key}={value}: expected at least 1")
    if training.work and not re.match(r"/|s3://[^/]+", training.work):
        raise SettingsError(f"training.work={training.work!r}: expected an absolute folder or s3://bucket/prefix")
    node = cluster.step("train")
    if cluster.watches("train") and node.gpus != 0 and not node.cpu and not node.gpu_type.startswith("nvidia.com/"):
        raise SettingsError(f"steps.train.cpu: expected CPUs, which a TrainJob needs beside {node.gpu_type}")


def _check_step(name: str, step: Step) -> None:
    def refuse(key: str, expected: str) -> SettingsError:
        return SettingsError(f"steps.{name}.{key}={getattr(step, key)!r}: expected {expected}")

    if step.cpu and not re.fullmatch(CPU, step.cpu):
        raise refuse("cpu", "a number of CPUs, such as 4 or 500m")
    for key in ("memory", "shm"):
        if getattr(step, key) and not re.fullmatch(MEMORY, getattr(step, key)):
            raise refuse(key, "bytes with a unit, such as 8Gi")
    for key in ("gpus", "retries", "retry_pause"):
        if (getattr(step, key) or 0) < 0:
            raise refuse(key, "at least 0")
    for claim, folder in step.volumes.items():
        if folder and not folder.startswith("/"):
            raise SettingsError(f"steps.{name}.volumes.{claim}={folder!r}: expected an absolute folder")
    for toleration in step.tolerations:
        if toleration.operator not in ("Equal", "Exists") or toleration.effect not in (None, *EFFECTS):
            raise refuse("tolerations", f"operator Equal or Exists and effect {', '.join(EFFECTS)} or none")
