"""What ``svip doctor`` finds: versions, devices, folders that can be written, and services that answer, with fixes.

Nothing here raises for what it looks at: what is amiss is a finding. No finding shows a password.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from svip.tracking import git_sha, shown_uri, tracking_uri
from svip.tracking.store import without_password

PATIENCE = 3.0
"""Seconds that a service has to answer."""
GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux tells a container its limits."""
SHOWN = ("torch", "torchvision", "timm", "mlflow", "kfp", "optuna")
"""Packages whose versions are told even where they are as they should be."""

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``fix`` says what to do about it unless it is ok."""

    group: str
    name: str
    state: State
    found: str
    fix: str = ""


def examine(bucket: str = "", root: Path | None = None) -> list[Finding]:
    """All findings. ``bucket``: an s3:// address to try too; ``root``: a folder of data sets to look into."""
    looks: list[Callable[[], list[Finding]]] = [
        software,
        devices,
        machine,
        folders,
        tracking_store,
        lambda: object_store(bucket),
        docker_engine,
        lambda: data_sets(root) if root else [],
    ]
    with ThreadPoolExecutor(len(looks)) as pool:  # some wait for a network
        return [finding for findings in pool.map(lambda look: look(), looks) for finding in findings]


def software() -> list[Finding]:
    """Python, svip, and whether each package that svip needs is there in a version that it works with."""
    from packaging.requirements import Requirement

    group = "software"
    python = Finding(group, "Python", "ok", platform.python_version())
    commit = f"commit {git_sha()[:12]}"
    try:
        found = [python, Finding(group, "svip", "ok", f"{version('svip')}, {commit}")]
    except PackageNotFoundError:  # it runs from its folder
        fix = "make setup, or pip install -e . where svip is; so it isn't known which packages it needs"
        return [python, Finding(group, "svip", "warning", f"not installed, {commit}", fix)]
    for needed in map(Requirement, requires("svip") or []):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            there = "not installed"
        if there == "not installed" or not needed.specifier.contains(there, prereleases=True):
            fix = "install the tested versions: make setup, or pip install -c constraints.txt svip"
            found.append(Finding(group, needed.name, "problem", f"{there}; svip needs {needed.specifier}", fix))
        elif needed.name in SHOWN:
            found.append(Finding(group, needed.name, "ok", there))
    return found


def devices() -> list[Finding]:
    """What training would run on."""
    group = "machine"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries
        fix = "install the pair anew: pip install --force-reinstall -c constraints.txt torch torchvision"
        return [Finding(group, "device", "problem", f"PyTorch can't be loaded: {error}", fix)]
    if torch.cuda.is_available():
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        found = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory / GIB:.0f} GiB"
            found.append(Finding(group, f"cuda:{index}", "ok", f"{about.name}, {memory}, {bf16}"))
        return found
    if Path("/dev/nvidiactl").exists():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        fix = "install PyTorch for CUDA (image: target cuda), or a driver that is new enough for it"
        return [Finding(group, "device", "problem", f"a GPU is here, PyTorch ({build}) can't use it", fix)]
    threads = torch.get_num_threads()
    return [Finding(group, "device", "ok", f"CPU, {threads} {'thread' if threads == 1 else 'threads'}")]


def machine() -> list[Finding]:
    """Cores and memory that this process may use, and the shared memory that carries the loaders' batches."""
    group = "machine"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (CGROUPS / "memory.max", CGROUPS / "memory" / "memory.limit_in_bytes"):  # cgroup v2, v1
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():
            memory = min(memory, int(text))  # v1 without a limit tells one beyond any memory
    few = memory < 4 * GIB
    found = [
        Finding(group, "cores", "ok", str(cores)),
        Finding(
            group,
            "memory",
            "warning" if few else "ok",
            f"{memory / GIB:.1f} GiB",
            "training wants 4 GiB or more; give the container or virtual machine more" if few else "",
        ),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < GIB
        fix = "loader workers pass batches through it: docker run --shm-size 2g, or train.workers=0" if small else ""
        found.append(Finding(group, "/dev/shm", "warning" if small else "ok", f"{size / GIB:.2f} GiB", fix))
    return found


def folders() -> list[Finding]:
    """The folders that svip writes to: where it is called, temporary files, and what is downloaded."""
    cache = Path(os.environ.get("SVIP_CACHE") or Path.home() / ".cache" / "svip")
    found = [_writable("working folder", Path.cwd(), "call svip in a folder of yours; docker run -v $PWD:/workspace")]
    try:
        found.append(_writable("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder of yours"))
    except FileNotFoundError:
        found.append(Finding("folders", "temporary files", "problem", "no folder", "set TMPDIR to a folder of yours"))
    return [*found, _writable("cache", cache, "set SVIP_CACHE, and HF_HOME, to a folder of yours")]


def _writable(name: str, folder: Path, fix: str) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("folders", name, "problem", f"{folder}: can't be written", fix)
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding("folders", name, "warning", text, "make room: a bundle of photos takes gigabytes")
    return Finding("folders", name, "ok", text)


def tracking_store() -> list[Finding]:
    """Whether MLflow's store can be reached; it is not asked for anything."""
    uri = tracking_uri()
    scheme = uri.partition(":")[0].lower()
    if scheme in ("http", "https"):
        trouble, fix = _http_trouble(uri), "is the server up, and MLFLOW_TRACKING_URI its address?"
        if "401" in trouble or "403" in trouble:
            fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif scheme == "sqlite":
        file = Path(uri.removeprefix("sqlite:///"))
        trouble, fix = _sqlite_trouble(file), "set MLFLOW_TRACKING_URI to a file that can be written, or a server"
    else:
        trouble, fix = _database_trouble(uri), "is the database up, and MLFLOW_TRACKING_URI its address?"
        if "No module named" in trouble:
            fix = "pip install 'svip[cluster]', and write postgresql+psycopg2://"
    if trouble:
        return [Finding("services", "MLflow", "problem", f"{shown_uri()}: {trouble}", fix)]
    return [Finding("services", "MLflow", "ok", shown_uri())]


def _http_trouble(uri: str) -> str:
    import requests

    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    verify = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() not in ("true", "1")
    try:
        answer = requests.get(  # one that needs a login, unlike /health
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1",
            auth=(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None,
            headers={"Authorization": f"Bearer {token}"} if token and not user else None,
            timeout=PATIENCE,
            verify=verify and (os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True),
        )
    except requests.Timeout:
        return f"no answer within {PATIENCE:g} s"
    except (requests.RequestException, OSError) as error:
        return f"not reachable ({type(error).__name__})"
    if answer.status_code != 200:
        return f"it answers {answer.status_code}"
    return "" if answer.headers.get("Content-Type", "").startswith("application/json") else "it is no MLflow server"


def _sqlite_trouble(file: Path) -> str:
    import sqlite3

    if not file.exists():
        return "" if os.access(file.absolute().parent, os.W_OK | os.X_OK) else "its folder can't be written"
    if not os.access(file, os.W_OK):
        return "it can't be written"
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return str(error)
    return ""


def _database_trouble(uri: str) -> str:
    import sqlalchemy

    try:
        options = {"connect_timeout": int(PATIENCE)} if uri.startswith("postgresql") else {}
        sqlalchemy.create_engine(uri, connect_args=options).connect().close()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:  # ValueError: a port that is no number
        return without_password(str(error).strip().splitlines()[0])
    return ""


def object_store(bucket: str = "") -> list[Finding]:
    """S3: the endpoint of the environment, and ``bucket`` (s3://name/prefix) where one is given."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
    shown = without_password(endpoint)
    group = "services"
    if not endpoint and not bucket:
        return []
    if endpoint and (trouble := _connection_trouble(endpoint)):
        fix = f"is the store up, and {next(name for name in names if os.environ.get(name))} its address?"
        return [Finding(group, "S3", "problem", f"{shown}: {trouble}", fix)]
    if not bucket:
        return [Finding(group, "S3", "ok", f"{shown} (svip doctor --bucket s3://NAME tries a bucket too)")]
    from svip.data import s3
    from svip.data.errors import DataError

    try:
        name, _ = s3.split_address(bucket)
        with s3.translated(bucket):
            s3.client(1).head_bucket(Bucket=name)
    except DataError as error:
        fix = "check the name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and what this user may do"
        return [Finding(group, "S3", "problem", without_password(str(error)), fix)]
    return [Finding(group, "S3", "ok", f"{bucket}{f' at {shown}' if endpoint else ''}")]


def _connection_trouble(address: str) -> str:
    """Why no connection to the host of a http(s):// address can be made, or nothing."""
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return "not a http:// or https:// address"
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=PATIENCE).close()
    except TimeoutError:
        return f"no answer within {PATIENCE:g} s"
    except (OSError, ValueError) as error:
        return f"not reachable ({getattr(error, 'strerror', None) or type(error).__name__})"
    return ""


def docker_engine() -> list[Finding]:
    """The engine that ``svip pipeline run --runner docker`` would use; within a container nobody expects one."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=int(PATIENCE))
        try:
            engine = client.version()
        finally:
            client.close()
    except (DockerException, OSError):
        if Path("/.dockerenv").exists() or os.environ.get("KUBERNETES_SERVICE_HOST"):
            return [Finding("services", "Docker", "ok", "no engine, and none is needed: this is a container")]
        where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        fix = "only the docker runner needs one: start it, join the group docker, or set DOCKER_HOST"
        return [Finding("services", "Docker", "warning", f"no engine answers at {where}", fix)]
    return [Finding("services", "Docker", "ok", f"{engine['Version']}, {engine['Os']}/{engine['Arch']}")]


def data_sets(root: Path) -> list[Finding]:
    """What of each data set lies under ``root``."""
    from svip.data.inventory import inventory

    if not root.is_dir():
        fix = f"svip fetch NAME --root {root}"
        return [Finding("data", str(root), "warning", "there is no such folder", fix)]
    found = []
    for package in inventory(root):
        if "images" not in package:
            continue
        here = package["here"]
        splits = f"Proposed Split v{here['proposed_split']}" if here["proposed_split"] else "no splits"
        whole = here["photos"] > 0 and here["proposed_split"]
        if here["photos"] or here["proposed_split"]:
            fix = "" if whole else f"svip fetch {package['name']} --root {root}"
            state: State = "ok" if whole else "warning"
            found.append(Finding("data", package["name"], state, f"{here['photos']:,} photos, {splits}", fix))
    return found or [Finding("data", str(root), "warning", "no data set", f"svip fetch NAME --root {root}")]
