"""The team's server as Compose sees it, and the script that starts it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose import INFRA, copy_infra, make_env, services, used_names
from manifests import build, named

SCRIPTS = (INFRA / "server.sh", INFRA / "k8s/example/secrets.sh")
ENDS = ("buckets",)
"""Services that do their work and end."""


@pytest.fixture(scope="module")
def infra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_infra(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def env(infra: Path) -> dict[str, str]:
    return make_env(infra)


@pytest.fixture(scope="module")
def server(env: dict[str, str]) -> dict[str, Any]:
    return services(env)


def test_compose_takes_the_file_and_the_settings_whatever_the_shell_has(infra: Path, env: dict[str, str]) -> None:
    plugin = ["docker", "compose", "version"]
    has_plugin = shutil.which("docker") and subprocess.run(plugin, capture_output=True).returncode == 0
    if not has_plugin and not shutil.which("docker-compose"):
        pytest.skip("needs Compose: apt-get install docker-compose")
    shell = {**os.environ, "AWS_SECRET_ACCESS_KEY": "of-the-cloud", "MLFLOW_DB_PASSWORD": "another"}
    command = [str(infra / "server.sh"), "compose", "config"]
    done = subprocess.run(command, capture_output=True, text=True, env=shell)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]
    assert set(read) == {"postgres", "s3", "buckets", "mlflow"}
    assert read["mlflow"]["environment"]["PGPASSWORD"] == env["MLFLOW_DB_PASSWORD"]
    assert read["s3"]["environment"]["AWS_SECRET_ACCESS_KEY"] == env["AWS_SECRET_ACCESS_KEY"]
    assert read["mlflow"]["depends_on"]["buckets"]["condition"] == "service_completed_successfully"


def test_ports_are_on_loopback_and_can_be_moved(env: dict[str, str]) -> None:
    without = {name: value for name, value in env.items() if name != "SERVER_ADDRESS" and not name.endswith("_PORT")}
    for settings in (env, without):
        ports = {name: service.get("ports", []) for name, service in services(settings).items()}
        assert ports == {
            "mlflow": ["127.0.0.1:5000:5000"],
            "s3": ["127.0.0.1:8333:8333"],
            "postgres": ["127.0.0.1:5432:5432"],
            "buckets": [],
        }
    assert services({**env, "MLFLOW_PORT": "5001"})["mlflow"]["ports"] == ["127.0.0.1:5001:5000"]


def test_containers_can_do_little(server: dict[str, Any]) -> None:
    for name, service in server.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service), name
        # the project's own image is one of a user that is not root
        assert service["image"] == "svip:latest" or not service["user"].startswith(("0", "root")), name


def test_images_are_pinned(server: dict[str, Any]) -> None:
    assert {service["image"] for service in server.values()} == {
        "svip:latest",
        "postgres:17.10-bookworm",
        "chrislusf/seaweedfs:4.48",
    }


def test_what_runs_is_watched_and_started_in_order(server: dict[str, Any]) -> None:
    for name, service in server.items():
        assert ("healthcheck" in service) != (name in ENDS), name
        for other, depends in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ENDS else "service_healthy"
            assert depends == {"condition": wanted}, (name, other)


def test_what_is_kept_lies_in_named_volumes(server: dict[str, Any]) -> None:
    volumes = set(yaml.safe_load((INFRA / "compose.yaml").read_text())["volumes"])
    kept = {
        volume.split(":")[0]
        for service in server.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("./")
    }
    assert kept == volumes == {"postgres", "s3"}


def test_mounted_files_are_there_and_can_only_be_read(server: dict[str, Any]) -> None:
    for service in server.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                source, _, mode = volume.split(":")
                assert (INFRA / source).is_file() and mode == "ro"


def test_settings_are_those_that_are_read(env: dict[str, str]) -> None:
    # Compose itself reads the project's name
    assert set(env) - {"COMPOSE_PROJECT_NAME"} == used_names() - {"MLFLOW_ALLOWED_HOSTS"}


def test_passwords_are_random_each_and_readable_by_their_owner_alone(
    infra: Path, env: dict[str, str], tmp_path: Path
) -> None:
    example = [line.split("=")[0] for line in (INFRA / ".env.example").read_text().splitlines() if line.endswith("=")]
    secrets = [env[name] for name in example]
    assert len(set(secrets)) == len(secrets) == 6
    assert all(len(secret) == 40 for secret in secrets)
    assert stat.S_IMODE((infra / ".env").stat().st_mode) == 0o600
    other = make_env(copy_infra(tmp_path))
    assert not {other[name] for name in example} & set(secrets)


def test_an_env_that_is_there_stays_as_it_is(infra: Path, env: dict[str, str]) -> None:
    assert make_env(infra) == env
    assert {path.name for path in infra.glob(".env*")} == {".env", ".env.example"}


def test_without_docker_it_says_so(infra: Path, tmp_path: Path) -> None:
    for program in ("bash", "dirname", "env"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    done = subprocess.run([infra / "server.sh", "up"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "there is no docker command: install Docker Engine with its compose plugin\n"


def test_no_password_is_in_a_command_line(env: dict[str, str], server: dict[str, Any]) -> None:
    secrets = {value for value in env.values() if len(value) == 40}
    for service in server.values():
        words = " ".join([*service.get("entrypoint", []), *service.get("command", []), *_probe(service)])
        assert not [secret for secret in secrets if secret in words]


def _probe(service: dict[str, Any]) -> list[str]:
    return list(service.get("healthcheck", {}).get("test", []))


def test_kubernetes_runs_the_same_servers(server: dict[str, Any]) -> None:
    dev = build(INFRA / "k8s/overlays/dev")
    mlflow, store, buckets, postgres = (
        named(dev, kind, name)["spec"]["template"]["spec"]["containers"][0]
        for kind, name in (
            ("Deployment", "svip-mlflow"),
            ("StatefulSet", "svip-s3"),
            ("Job", "svip-s3-buckets"),
            ("StatefulSet", "svip-postgres"),
        )
    )
    assert (store["image"], store["command"], store["args"]) == tuple(
        server["s3"][key] for key in ("image", "entrypoint", "command")
    )
    assert (buckets["command"], buckets["args"]) == (server["buckets"]["entrypoint"], server["buckets"]["command"])
    assert postgres["image"] == server["postgres"]["image"]
    # there the buckets come from the environment, and the names it answers to from the namespace
    own = ("--artifacts-destination", "--allowed-hosts")
    assert mlflow["command"] == server["mlflow"]["entrypoint"]
    assert [word for word in mlflow["args"] if not word.startswith(own)] == [
        word for word in server["mlflow"]["command"] if not word.startswith(own)
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
