"""Run the steps of a pipeline in containers on this machine, by kfp's DockerRunner.

A container sees the same paths as a process would: the working folder, and what the configuration names outside of it.
It has the user, the network and the settings of who starts the pipeline. Its own root can't be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
from docker.errors import DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount
from kfp import local
from kfp.local import docker_task_handler

from components import IMAGE
from pipelines.catalog import PipelineError
from pipelines.processes import directly
from svip.config import Config
from svip.data.sources import is_remote
from svip.tracking import tracking_uri

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

LABEL = "svip.run"
"""Label of a run's containers."""
GRACE = 10
"""Seconds that a container has to end after SIGTERM."""
PASSED = ("AWS_", "HF_", "MLFLOW_", "SVIP_", "TQDM_", "OMP_", "NCCL_", "CUDA_", "PYTHONUNBUFFERED", "TZ")
PASSED_IN_ANY_CASE = ("http_proxy", "https_proxy", "no_proxy")
"""Environment that containers inherit: names, or how they begin."""
NAME_FILES = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""Those of them that name a file which is read."""
WRITES_NO_FILE = ("system.Metrics", "system.ClassificationMetrics", "system.SlicedClassificationMetrics")
"""Artifacts that are all metadata."""


class Containers:
    """The containers of one run: ``runner`` for kfp, and ``stop``."""

    def __init__(self, config: Config, preset: str, out: Path, space: str = "") -> None:
        """``space``: tuning's, by name or as a file. PipelineError where there is no engine, or no image."""
        self.id = uuid.uuid4().hex
        self._stopped = False
        try:
            client = docker.from_env()
            image = client.images.get(IMAGE)
            gpus = "nvidia" in client.info().get("Runtimes", {})
        except ImageNotFound:
            raise PipelineError(
                f"image {IMAGE} is not there: build it (make image), pull it, or name another one in SVIP_IMAGE"
            ) from None
        except DockerException as error:
            where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
            raise PipelineError(
                f"no Docker engine answers at {where}: start one, set DOCKER_HOST, or use --runner subprocess ({error})"
            ) from error
        self._client = client
        root = [config.data.root] if config.data.root and Path(config.data.root).is_dir() else []
        fetches = config.data.mirror is not None
        writable = [str(Path.cwd()), str(out), *caches(), *tracking_folders(), *(root if fetches else [])]
        self.runner = local.DockerRunner(
            user=f"{os.getuid()}:{os.getgid()}",
            working_dir=str(Path.cwd()),
            entrypoint=[""],  # kfp gives the whole command, and Docker takes it for arguments of the image's own
            environment={"SVIP_IMAGE_DIGEST": str(image.id), **passed_environment(os.environ)},
            mounts=mounts(writable, [*sources(config, preset, space), *root]),
            network_mode="host",  # a tracking server of this machine is at 127.0.0.1 for the steps too
            shm_size=shared_memory(),
            init=True,  # what has process id 1 doesn't end on SIGTERM by itself
            read_only=True,
            tmpfs={"/tmp": ""},
            security_opt=["no-new-privileges", "label=disable"],  # label: SELinux, to which mounts would be foreign
            healthcheck={"test": ["NONE"]},
            device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else None,
            labels={LABEL: self.id},
        )

    @contextlib.contextmanager
    def in_place_of_kfps(self) -> Iterator[None]:
        """kfp has a container removed as it ends, and calls it a success when it comes too late for the exit code."""
        theirs = docker_task_handler.run_docker_container
        docker_task_handler.run_docker_container = self._run
        try:
            yield
        finally:
            docker_task_handler.run_docker_container = theirs
            self.stop()
            self._client.close()

    def stop(self) -> None:
        """Stop and remove all containers of the run; none is started any more."""
        self._stopped = True
        for container in self._client.containers.list(all=True, filters={"label": f"{LABEL}={self.id}"}):
            with contextlib.suppress(DockerException):  # it ended meanwhile
                container.stop(timeout=GRACE)
                container.remove(force=True)

    def _run(
        self, client: DockerClient, image: str, command: Sequence[str], volumes: Mapping[str, Any], **options: Any
    ) -> int:
        """Run one step and print its log; 0 where it succeeded and left all that it should."""
        if self._stopped:
            return 1
        try:
            container = client.containers.create(image, directly(command), volumes=volumes, **options)
            try:
                container.start()
                for line in lines(container):
                    print(line)
                code = int(container.wait()["StatusCode"])
                container.reload()
                if container.attrs["State"].get("OOMKilled"):
                    print("the container was killed: it needed more memory than it may have")
            finally:
                with contextlib.suppress(DockerException):  # stop() may have done so, on a signal
                    container.remove(force=True)
        except DockerException as error:
            print(f"Docker: {error}")
            return 1
        missing = missing_outputs(command) if code == 0 else []
        if missing:
            print(f"the step ended well, but left no {', '.join(missing)}")
        return code or bool(missing)


def lines(container: Container) -> Iterator[str]:
    """A container's output, line by line, until it ends."""
    rest = b""
    for chunk in container.logs(stream=True, follow=True):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


def missing_outputs(command: Sequence[str]) -> list[str]:
    """What a step should have written and did not, of the outputs that kfp names in its command."""
    if "--executor_input" not in command:
        return []
    outputs = json.loads(command[command.index("--executor_input") + 1])["outputs"]
    wanted = [] if not outputs.get("parameters") else [outputs["outputFile"]]
    for artifacts in outputs.get("artifacts", {}).values():
        for artifact in artifacts["artifacts"]:
            if artifact["type"]["schemaTitle"] not in WRITES_NO_FILE:
                wanted.append(artifact["uri"])
    return [path for path in wanted if not Path(path).exists()]


def sources(config: Config, preset: str, space: str = "") -> list[str]:
    """Local files and folders that the steps read; of a table also its folder, from where photos' paths count."""
    data, semantics = config.data, config.semantics
    vectors = (semantics.vectors or "").partition("::")[0]  # FILE.zip::MEMBER
    tables = [str(Path(table).parent) for table in (data.images, data.attributes) if table]
    own = Path.home() / ".aws"  # profiles and credentials of boto3
    files = [os.environ.get(variable) for variable in NAME_FILES]
    named = [preset, space, *files, data.mirror, vectors, semantics.phrases, config.model.weights, *tables, str(own)]
    return [path for path in named if path and not is_remote(path) and Path(path).exists()]


def caches() -> list[str]:
    """Where downloads are kept on this machine; made if need be, since Docker would make them as root."""
    home = Path.home() / ".cache"
    folders = [os.environ.get("SVIP_CACHE") or home / "svip", os.environ.get("HF_HOME") or home / "huggingface"]
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return [str(folder) for folder in folders]


def tracking_folders() -> list[str]:
    """The folder of MLflow's SQLite file, and so of its artifacts, and SVIP_OUTBOX, made if need be; where given."""
    uri, outbox = tracking_uri(), os.environ.get("SVIP_OUTBOX")
    if outbox:
        Path(outbox).mkdir(parents=True, exist_ok=True)
    sqlite = [str(Path(uri.removeprefix("sqlite:///")).parent)] if uri.startswith("sqlite:///") else []
    return [*sqlite, *([outbox] if outbox else [])]


def mounts(writable: Sequence[str], readable: Sequence[str]) -> list[Mount]:
    """Bind mounts at the same paths as outside, and of where links lead; what a mount holds already needs none."""
    read_only: dict[Path, bool] = {}
    for paths, only in ((writable, False), (readable, True)):
        for path in paths:
            for place in (Path(path).absolute(), Path(path).resolve()):
                holders = {place, *place.parents} & read_only.keys()
                if not any(only or not read_only[holder] for holder in holders):
                    read_only[place] = only
    return [Mount(str(path), str(path), type="bind", read_only=only) for path, only in read_only.items()]


def passed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What containers get of this environment."""
    passed = {
        name: value
        for name, value in environment.items()
        if name.startswith(PASSED) or name.lower() in PASSED_IN_ANY_CASE
    }
    own = {
        "HOME": str(Path.home()),
        "TMPDIR": "/tmp",
        "MPLCONFIGDIR": f"{caches()[0]}/matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
    }
    return {**passed, **own}


def shared_memory() -> int:
    """Bytes of /dev/shm: as many as this machine has. Docker's 64 MiB are too few for loaders' batches."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 2 << 30
