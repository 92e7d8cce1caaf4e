"""The image: what is in it, and that every step runs in it as anybody, with one folder to write to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docker import DockerClient
from tiny_model import TINY

from benchmarks.docker_engine import environment
from svip.data.bundle import read_bundle

pytestmark = [pytest.mark.docker, pytest.mark.slow]
SOMEBODY = 4242
"""A user that no file of the image knows."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("workspace")
    folder.chmod(0o777)
    yield folder


@pytest.fixture
def about(docker_client: DockerClient, image: str) -> dict[str, Any]:
    return dict(docker_client.images.get(image).attrs)


def run(engine: str, image: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = ["docker", "run", "--rm", "--network", "none", *options, image, *arguments]
    return subprocess.run(command, env=environment(engine), capture_output=True, text=True, check=False)


def shell(engine: str, image: str, script: str, *options: str) -> str:
    done = run(engine, image, "-c", script, options=("--entrypoint", "sh", *options))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sealed(workspace: Path) -> tuple[str, ...]:
    """As strict as it gets: any user, no capability, nothing to write to but the mounted folder."""
    user = f"{SOMEBODY}:{SOMEBODY}"
    return ("--user", user, "--read-only", "--cap-drop", "ALL", "--volume", f"{workspace}:/workspace")


def test_it_says_what_it_is_and_runs_svip_as_an_ordinary_user(about: dict[str, Any]) -> None:
    settings = about["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in settings["Labels"].items()}
    assert (labels["title"], labels["licenses"], labels["revision"]) == ("svip", "Apache-2.0", "0123abc")
    assert "SVIP_GIT_SHA=0123abc" in settings["Env"]
    assert settings["User"] == "1000:1000"
    assert settings["Entrypoint"] == ["svip"]
    assert settings["WorkingDir"] == "/workspace"
    assert settings["Healthcheck"]["Test"] == ["CMD", "svip", "doctor"]


def test_nothing_of_building_it_is_left(engine: str, image: str) -> None:
    compilers = shell(engine, image, "for name in cc gcc g++ c++ ld make cmake; do command -v $name; done; true")
    assert not compilers
    left = shell(
        engine,
        image,
        "ls -d /src /wheels /packages /code /root/.cache 2>/dev/null; find / -xdev -name '*.whl' -not -path '/usr/*'"
        " -o -xdev -path '*/pip/http*'; find /tmp -mindepth 1; true",
        "--user=0",
    )
    assert not left


def test_every_command_of_a_cluster_is_there(engine: str, image: str) -> None:
    said = shell(
        engine,
        image,
        "torchrun --help | head -1; mlflow --version; python3 -c '"
        "import kfp.kubernetes, kubeflow.trainer, psycopg2, boto3, getpass, svip; "
        "print(svip.__file__, getpass.getuser())'",
        f"--user={SOMEBODY}",
    )
    assert said.startswith("usage: torchrun")
    assert said.endswith("/opt/svip/lib/python3.11/site-packages/svip/__init__.py svip\n")


def test_doctor_finds_no_problem_with_a_root_that_can_only_be_read(engine: str, image: str, workspace: Path) -> None:
    done = run(engine, image, "doctor", "--json", options=sealed(workspace))
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, found
    assert {name for name, finding in found.items() if finding["state"] != "ok"} <= {"/dev/shm"}
    assert "0123abc" in found["svip"]["found"]
    assert found["torch"]["found"].startswith("2.")
    assert found["/dev/shm"]["state"] == "warning", "Docker gives 64 MiB unless told otherwise"


def test_doctor_names_a_folder_that_cannot_be_written(engine: str, image: str) -> None:
    done = run(engine, image, "doctor", options=("--read-only",))
    assert done.returncode == 1
    assert "/workspace: can't be written" in done.stdout


def test_every_step_runs_on_a_mounted_folder_and_nothing_else_is_written(
    engine: str, image: str, workspace: Path
) -> None:
    def step(*arguments: str) -> str:
        done = run(engine, image, *arguments, options=sealed(workspace))
        assert done.returncode == 0, f"{arguments[0]}: {done.stdout}{done.stderr}"
        return done.stdout

    step("prepare-data", "--preset", "smoke", "--out", "bundle")
    bundle = read_bundle(workspace / "bundle")
    assert bundle.info["counts"]["images"] == {
        **{"train": 1040, "val_seen": 160, "val_unseen": 300},
        **{"test_seen": 400, "test_unseen": 300},
    }
    assert bundle.image(0).shape == (64, 64, 3)

    step("embed-attributes", "--bundle", "bundle", "--out", "vectors")
    assert np.load(workspace / "vectors" / "vectors.npy").shape == (len(bundle.attribute_names), 50)
    assert (workspace / "vectors" / "vectors.npy").stat().st_uid == SOMEBODY

    step("train", "--bundle", "bundle", "--vectors", "vectors", "--out", "model", *TINY)
    said = step("evaluate", "--checkpoint", "model", "--bundle", "bundle", "--out", "evaluation")
    numbers = json.loads((workspace / "evaluation" / "metrics.json").read_text())["protocols"]["validation"]
    assert f"{numbers['T1']:.1f}" in said
    assert json.loads((workspace / "model" / "model.json").read_text())["bundle_sha256"] == bundle.sha256
    step("report", "--checkpoint", "model", "--bundle", "bundle", "--evaluation", "evaluation", "--out", "report")
    assert "0123abc" in (workspace / "report" / "report.html").read_text()
    visible = {path.name for path in workspace.iterdir() if not path.name.startswith(".")}
    assert visible == {"bundle", "vectors", "model", "evaluation", "report", "mlflow.db", "mlruns"}
