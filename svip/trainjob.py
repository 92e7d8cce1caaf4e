"""Training on several nodes of a cluster, as a TrainJob of Kubeflow Trainer. The only file that knows Kubeflow's SDK.

It needs the extra ``cluster``, and a (Cluster)TrainingRuntime; infra/k8s has one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from svip import tracking
from svip.config import Config, ConfigError, presets
from svip.data.bundle_cache import open_bundle, push_bundle
from svip.data.s3 import upload
from svip.data.sources import is_remote
from svip.semantics.vectors import FILES, open_embedding, vectors_sha256
from svip.training.work import Place

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

log = logging.getLogger(__name__)

PASSED_ON = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_CA_BUNDLE"),
    *("MLFLOW_RUN_ID", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "HF_ENDPOINT", "HF_HOME", "NCCL_DEBUG"),
    *("SVIP_GIT_SHA", "SVIP_IMAGE_DIGEST", "SVIP_OUTBOX"),
)
"""Plain settings that the nodes get as this process has them."""
TRACKING = "svip-mlflow"
SECRETS = {
    TRACKING: ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "svip-s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""Secret of the namespace -> its keys, each of them a variable of the nodes; those that are not there are left out."""
API = ("trainer.kubeflow.org", "v1alpha1")
PIPELINE_RUN = "pipeline/runid"
"""Label of a job that a pipeline's run has made, with the run's id (SVIP_PIPELINE_RUN): Kubeflow's own of its pods."""
COMPLETE, FAILED = "Complete", "Failed"
PAUSE = 5.0
"""Seconds between two looks at a job."""
LAST_LINES = 20
"""Lines of the log that an error shows: those up to svip's own error, after which torchrun says much more."""
PATIENCE = 12
"""Looks that may fail in a row, before a cluster that does not answer is an error."""


class TrainJobError(RuntimeError):
    """A TrainJob that failed, or can't be made; the message names it and what to look at."""


@dataclass(frozen=True)
class Training:
    """What the nodes are to train. ``place`` keeps it, and ``arguments`` are the rest of ``svip train``'s."""

    bundle: str
    vectors: str
    place: str
    arguments: Sequence[str]
    config: Config


def run(training: Training, nodes: int, processes: int) -> None:
    """Train on so many nodes with so many processes each, until the training has finished at its place.

    The job's name follows from the place and from what is trained, so a step that is tried again finds the job that it
    has started before: it watches it, or takes its result. One that has failed is removed and made anew, and goes on
    from the last checkpoint. TrainJobError, with the end of the log, where it fails.
    """
    training, client = visible(training), _client()
    _check_tracking(client)
    job = render(training, nodes, processes, _kind_of_runtime(client))
    name = job.metadata.name
    status = _status(client, name)
    # a complete one may be left of a training whose result was taken and removed
    if status == FAILED or (status == COMPLETE and not Place(training.place).finished()):
        log.warning("TrainJob %s of an earlier try (%s) is made anew, and goes on where it was", name, status)
        _remove(client, name)
        status = None
    if status is None:
        _create(client, job)
        log.info("TrainJob %s: %d nodes with %d processes each", name, nodes, processes)
    else:
        log.info("TrainJob %s is there already (%s)", name, status)
        _take_over(client, job)
    try:
        _watch(client, name)
    except (KeyboardInterrupt, SystemExit):
        log.warning(
            "TrainJob %s goes on: the same command watches it again, `kubectl delete trainjob %s` ends it", name, name
        )
        raise
    _remove(client, name)


def end(pipeline_run: str) -> None:
    """Delete the TrainJobs of a pipeline's run that has ended, be it stopped: nobody watches them any more.

    TrainJobError, after all have been tried, where they may go on.
    """
    from kubernetes.client import ApiException

    client = _client()
    backend, label, failed = client.backend, f"{PIPELINE_RUN}={pipeline_run}", []
    try:
        left = backend.custom_api.list_namespaced_custom_object(
            *API, backend.namespace, "trainjobs", label_selector=label
        )["items"]
    except ApiException as error:
        left, failed = [], [f"they can't be listed: {_reason(error)}"]
    for job in left:
        name = job["metadata"]["name"]
        log.warning("TrainJob %s is deleted: its pipeline has ended", name)
        try:
            _remove(client, name)
        except TrainJobError as error:
            failed.append(str(error))
    if failed:
        raise TrainJobError(
            f"the TrainJobs of run {pipeline_run} may go on ({'; '.join(failed)}): "
            f"`kubectl delete trainjobs -l {label}` ends them"
        )


def visible(training: Training) -> Training:
    """The same training with inputs where every node sees them.

    What is not at an address, nor on the volume of SVIP_WORK, is copied below SVIP_WORK. ConfigError where that is none
    which the nodes see.
    """
    work = os.environ.get("SVIP_WORK", "").rstrip("/")
    if not is_remote(training.place) and not work:
        raise ConfigError(
            f"--out {training.place}: no other node sees this folder; give an s3:// address, or set SVIP_WORK to one "
            "or to a folder on a volume that all nodes mount"
        )
    preset = next((text for text in training.arguments if text.startswith("--preset=")), "--preset=smoke")
    if preset.removeprefix("--preset=") not in presets():
        raise ConfigError(f"{preset}: other nodes can't see this file; use a shipped preset and overrides")
    base = work or training.place
    bundle, vectors = training.bundle, training.vectors
    if not _seen(bundle, base):
        data = open_bundle(bundle)
        bundle = f"{base}/inputs/bundle-{data.sha256[:16]}"
        log.info("copying the bundle to %s, for the nodes", bundle)
        if is_remote(base):
            push_bundle(data, bundle)
        else:
            _copy(data.path, Path(bundle), [*data.info["files"], "bundle.json"])
    if not _seen(vectors, base):
        digest = vectors_sha256(open_embedding(vectors).vectors)
        source, vectors = Path(vectors), f"{base}/inputs/vectors-{digest[:16]}"
        if is_remote(base):
            for file in FILES:
                upload(source / file, f"{vectors}/{file}")
        else:
            _copy(source, Path(vectors), FILES)
    return Training(bundle, vectors, training.place, training.arguments, training.config)


def _seen(path: str, base: str) -> bool:
    """Whether all nodes see it: at an address, or on the same volume as the folder ``base``."""
    if is_remote(path) or is_remote(base):
        return is_remote(path)
    Path(base).mkdir(parents=True, exist_ok=True)
    return _volume(path) == _volume(base) != Path("/")


def _volume(path: str) -> Path:
    """Where the volume is mounted that holds the path."""
    place = Path(path).resolve()
    while not place.is_mount():
        place = place.parent
    return place


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Whole or not at all; what is there already is left."""
    if target.exists():
        return
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in names:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, part / name)
    part.replace(target)


def render(
    training: Training, nodes: int, processes: int, kind: str = "ClusterTrainingRuntime"
) -> TrainerV1alpha1TrainJob:
    """The TrainJob: torchrun on each node, settings as here, and secrets by the names of their Secrets alone.

    The SDK's own trainers know plain values of environment variables only, and no processes of a node; so its API
    models are used. ``kind`` is that of the runtime.
    """
    from kubeflow_trainer_api import models

    files = [f"--bundle={training.bundle}", f"--vectors={training.vectors}", f"--out={training.place}"]
    plain = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    plain |= {"SVIP_GIT_SHA": tracking.git_sha(), "PYTHONUNBUFFERED": "1"}
    plain["SVIP_WORK"] = ""  # whatever the runtime sets: training is kept where --out says
    if plain["SVIP_GIT_SHA"] == "unknown":
        del plain["SVIP_GIT_SHA"]
    env = [models.IoK8sApiCoreV1EnvVar(name=name, value=value) for name, value in sorted(plain.items())]
    env += [_secret(secret, key) for secret, keys in SECRETS.items() for key in keys]
    of = "\n".join([training.place, *training.arguments])
    name = f"svip-train-{hashlib.sha256(of.encode()).hexdigest()[:12]}"
    pipeline_run = os.environ.get("SVIP_PIPELINE_RUN")
    return models.TrainerV1alpha1TrainJob(
        apiVersion="trainer.kubeflow.org/v1alpha1",
        kind="TrainJob",
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            name=name,
            labels={
                "app.kubernetes.io/name": "svip",
                "app.kubernetes.io/component": "train",
                **({PIPELINE_RUN: pipeline_run} if pipeline_run else {}),
            },
        ),
        spec=models.TrainerV1alpha1TrainJobSpec(
            runtimeRef=models.TrainerV1alpha1RuntimeRef(name=_runtime(), kind=kind),
            trainer=models.TrainerV1alpha1Trainer(
                image=os.environ.get("SVIP_IMAGE"),
                command=["torchrun", "-m", "svip.cli", "train", *files, *training.arguments],
                numNodes=nodes,
                numProcPerNode=processes,
                env=env,
                resourcesPerNode=_resources(training, processes),
            ),
        ),
    )


def _resources(training: Training, processes: int) -> Any:
    """What a node asks for; None leaves it to the runtime, all of whose resources this replaces, whatever it names."""
    from kubeflow_trainer_api import models

    cpu, memory = os.environ.get("SVIP_NODE_CPU"), os.environ.get("SVIP_NODE_MEMORY")
    requests: dict[str, int | str] = {"cpu": cpu} if cpu else {}
    limits: dict[str, int | str] = {"memory": memory} if memory else {}
    gpu = os.environ.get("SVIP_GPU_TYPE") or "nvidia.com/gpu"
    gpus = int(os.environ.get("SVIP_NODE_GPUS") or processes) if training.config.train.device != "cpu" else 0
    if gpus:
        limits[gpu] = gpus
    requests |= limits
    if not gpus or not gpu.startswith("nvidia.com/"):  # the SDK can't read limits without a device it knows
        if gpus and not cpu:
            raise ConfigError(f"nodes with {gpu}: set SVIP_NODE_CPU too, which Kubeflow's SDK wants beside it")
        limits = limits | {"cpu": cpu} if cpu else {}
    if not requests:
        return None
    quantity = models.IoK8sApimachineryPkgApiResourceQuantity
    asked = [{key: quantity(value) for key, value in part.items()} for part in (requests, limits)]
    return models.IoK8sApiCoreV1ResourceRequirements(requests=asked[0], limits=asked[1] or None)


def _secret(secret: str, key: str) -> Any:
    """The variable of a Secret's key; an address that is no secret is passed on as it is here."""
    from kubeflow_trainer_api import models

    if key == "MLFLOW_TRACKING_URI" and (uri := _plain_tracking_uri()):
        return models.IoK8sApiCoreV1EnvVar(name=key, value=uri)
    reference = models.IoK8sApiCoreV1SecretKeySelector(name=secret, key=key, optional=True)
    source = models.IoK8sApiCoreV1EnvVarSource(secretKeyRef=reference)
    return models.IoK8sApiCoreV1EnvVar(name=key, valueFrom=source)


def _plain_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI where it holds no password, and is not of this machine alone; else the Secret says it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    own = urlsplit(uri).hostname in (None, "localhost", "127.0.0.1", "::1")
    return "" if own or tracking.shown_uri() != uri else uri


def _check_tracking(client: TrainerClient) -> None:
    """TrainJobError where this process tracks, and the nodes would track into files of their own, which are lost."""
    from kubernetes.client import ApiException

    if not os.environ.get("MLFLOW_TRACKING_URI") or _plain_tracking_uri():
        return
    backend = client.backend
    try:
        backend.core_api.read_namespaced_secret(TRACKING, backend.namespace)
    except ApiException as error:
        if error.status == 404:  # and not 403: a pod may use Secrets that it may not read
            raise TrainJobError(
                f"the nodes can't track at {tracking.shown_uri()}: make the Secret {TRACKING} in namespace "
                f"{backend.namespace} with the key MLFLOW_TRACKING_URI, an address that they reach"
            ) from None


def _runtime() -> str:
    return os.environ.get("SVIP_TRAINING_RUNTIME") or "svip"


def _client() -> TrainerClient:
    try:
        from kubeflow.trainer import KubernetesBackendConfig, TrainerClient
    except ImportError:
        raise TrainJobError("training on several nodes needs Kubeflow's SDK: pip install 'svip[cluster]'") from None
    logging.getLogger("kubeflow").setLevel(logging.ERROR)  # it warns where it can't read Trainer's version
    try:
        # None: those of the pod, else of the current context
        namespace, file = os.environ.get("SVIP_NAMESPACE") or None, os.environ.get("KUBECONFIG") or None
        return TrainerClient(KubernetesBackendConfig(namespace=namespace, config_file=file))
    except Exception as error:  # the client of Kubernetes has no common one
        raise TrainJobError(
            f"no cluster to make a TrainJob in ({error}); run this in a pod, or set KUBECONFIG"
        ) from None


def _kind_of_runtime(client: TrainerClient) -> str:
    try:
        return str(client.get_runtime(_runtime()).kind.value)
    except (RuntimeError, TimeoutError) as error:
        raise TrainJobError(
            f"{error}: {_reason(error)}; set SVIP_TRAINING_RUNTIME to one that `kubectl get trainingruntimes,"
            "clustertrainingruntimes` lists"
        ) from None


def _create(client: TrainerClient, job: TrainerV1alpha1TrainJob) -> None:
    from kubernetes.client import ApiException

    backend = client.backend
    try:
        backend.custom_api.create_namespaced_custom_object(*API, backend.namespace, "trainjobs", job.to_dict())
    except ApiException as error:
        if error.status != 409:  # which another try beside this one has made
            raise TrainJobError(f"TrainJob {job.metadata.name} can't be made: {_reason(error)}") from None


def _take_over(client: TrainerClient, job: TrainerV1alpha1TrainJob) -> None:
    """Have the job belong to this pipeline's run, so that this one's end ends it, and not that of who has made it."""
    from kubernetes.client import ApiException

    backend, name, labels = client.backend, job.metadata.name, job.metadata.labels
    if PIPELINE_RUN not in labels:  # of no pipeline: whose it is stays as it is
        return
    body = {"metadata": {"labels": {PIPELINE_RUN: labels[PIPELINE_RUN]}}}
    try:
        backend.custom_api.patch_namespaced_custom_object(*API, backend.namespace, "trainjobs", name, body)
    except ApiException as error:  # no reason not to watch it
        log.warning(
            "TrainJob %s can't be given the label of this pipeline's run (%s), and may go on after it: "
            "`kubectl delete trainjob %s` ends it",
            *(name, _reason(error), name),
        )


def _remove(client: TrainerClient, name: str) -> None:
    """Delete the job, and wait until it is gone with its pods' names."""
    try:
        client.delete_job(name)
    except (RuntimeError, TimeoutError) as error:
        if getattr(error.__cause__, "status", None) != 404:
            raise TrainJobError(f"{error}: {_reason(error)}") from None
    while _status(client, name) is not None:
        time.sleep(PAUSE)


def _status(client: TrainerClient, name: str) -> str | None:
    """Created, Running, Complete or Failed; None for no such job. A cluster that is silent for a while is borne."""
    for attempt in range(1, PATIENCE + 1):
        try:
            return str(client.get_job(name).status)
        except (RuntimeError, TimeoutError) as error:
            if getattr(error.__cause__, "status", None) == 404 and "TrainJob:" in str(error):
                return None
            if attempt == PATIENCE:
                raise TrainJobError(f"{error}: {_reason(error)}") from None
            log.debug("%s: %s", error, _reason(error))
        time.sleep(PAUSE)
    raise AssertionError("unreachable")


def _watch(client: TrainerClient, name: str) -> None:
    """Show node 0's log until the job has ended; TrainJobError unless it is complete."""
    shown: dict[str, int] = {}
    last: deque[str] = deque(maxlen=500)
    looks_at_the_end = 0
    while True:
        status = _status(client, name)
        whole = _show(client, name, shown, last)
        if status in (COMPLETE, FAILED) and not whole and looks_at_the_end < PATIENCE:
            looks_at_the_end += 1
            time.sleep(PAUSE)
            continue
        if status == COMPLETE:
            return
        if status is None:
            raise TrainJobError(f"TrainJob {name} was deleted; the same command makes it anew, and goes on")
        if status == FAILED:
            raise TrainJobError(f"TrainJob {name} has failed. The end of the log of node 0:\n{_end_of(list(last))}")
        time.sleep(PAUSE)


def _end_of(lines: list[str]) -> str:
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    end = lines[: errors[-1] + 1] if errors else lines
    return "\n".join(end[-LAST_LINES:]) or "(it has left none; see `kubectl describe trainjob`)"


def _show(client: TrainerClient, name: str, shown: dict[str, int], last: deque[str]) -> bool:
    """Show what node 0 says until it ends; False where the connection did before.

    ``shown`` counts the lines of each of its pods.
    """
    try:
        pods = [step.pod_name for step in client.get_job(name).steps if step.name == "node-0"]
        for number, line in enumerate(client.get_job_logs(name, follow=True)):
            if number >= shown.get(pods[0], 0):
                log.info("%s", line)
                last.append(line)
                shown[pods[0]] = number + 1
    except (RuntimeError, TimeoutError) as error:  # there is nothing to be read yet, or the connection was cut
        log.debug("%s: %s", error, _reason(error))
        return False
    return True


def _reason(error: BaseException) -> str:
    """What Kubernetes says, which the SDK's errors keep as their cause."""
    cause = error.__cause__ or error
    return str(getattr(cause, "reason", None) or cause)
