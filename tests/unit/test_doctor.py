"""svip doctor: what is well, what is not, and that no password is shown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.s3server import KEYS
from svip import cli, doctor
from svip.data import s3


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that knows one user, as MLflow with logins does."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Basic bWU6c2VjcmV0"  # me:secret
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def mlflow(monkeypatch: pytest.MonkeyPatch, uri: str) -> doctor.Finding:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (finding,) = doctor.tracking_store()
    return finding


def test_a_server_is_well_only_where_it_lets_this_user_in(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = mlflow(monkeypatch, server)
    assert (refused.state, refused.found) == ("problem", f"{server}: it answers 401")
    assert "MLFLOW_TRACKING_USERNAME" in refused.fix
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert mlflow(monkeypatch, server) == doctor.Finding("services", "MLflow", "ok", server)


@pytest.mark.parametrize(
    "uri",
    ["http://me:secret@127.0.0.1:9", "postgresql+psycopg2://me:secret@127.0.0.1:9/mlflow", "nonsense://me:secret@x"],
)
def test_a_store_that_does_not_answer_is_a_problem_told_without_its_password(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = mlflow(monkeypatch, uri)
    assert finding.state == "problem"
    assert uri.replace("secret", "***") in finding.found
    assert "secret" not in str(finding)


@pytest.mark.parametrize("uri", ["postgresql+psycopg2://me:secret@host:port/mlflow", "http://me:secret@[::1/mlflow"])
def test_an_address_that_is_none_is_a_problem(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = mlflow(monkeypatch, uri)
    assert (finding.state, "secret" in str(finding)) == ("problem", False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", uri)
    (store,) = doctor.object_store()
    assert (store.state, "secret" in str(store)) == ("problem", False)


def test_a_sqlite_file_may_be_new_and_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflow(monkeypatch, f"sqlite:///{tmp_path}/new.db").state == "ok"
    assert not (tmp_path / "new.db").exists()
    (tmp_path / "other.db").write_text("x" * 2000)
    assert "not a database" in mlflow(monkeypatch, f"sqlite:///{tmp_path}/other.db").found


def test_a_package_of_another_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {finding.state for finding in doctor.software()} == {"ok"}
    real = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.13.0+cpu" if name == "torch" else real(name))
    (torch,) = [finding for finding in doctor.software() if finding.state != "ok"]
    assert (torch.name, torch.found) == ("torch", "2.13.0+cpu; svip needs ==2.14.1")


def test_the_cpu_build_of_the_right_version_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.14.1+cpu" if name == "torch" else real(name))
    assert {finding.state for finding in doctor.software()} == {"ok"}


def test_svip_that_is_not_installed_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    python, svip = doctor.software()
    assert (python.state, svip.name, svip.state) == ("ok", "svip", "warning")
    assert svip.found.startswith("not installed, commit ") and "pip install -e ." in svip.fix


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(("limit", "gib"), [(f"{3 << 29}\n", 1.5), ("max\n", None), ("9223372036854771712\n", None)])
def test_the_limit_of_a_container_is_read_from_either_version_of_cgroups(
    *, file: str, limit: str, gib: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CGROUPS", tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(limit)
    (memory,) = [finding for finding in doctor.machine() if finding.name == "memory"]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / doctor.GIB
    assert memory.found == f"{gib or whole:.1f} GiB"


def test_folders_that_cannot_be_written_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path)))  # root may write all
    monkeypatch.setenv("SVIP_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.chdir(tmp_path)
    states = {finding.name: finding.state for finding in doctor.folders()}
    assert states["working folder"] == states["cache"] == "problem"


def test_s3_is_tried_with_the_bucket_that_is_asked_for(weed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.object_store() == []
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": weed}.items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    s3.session.cache_clear()
    try:
        assert [finding.state for finding in doctor.object_store()] == ["ok"]
        (missing,) = doctor.object_store("s3://nobody/bundles")
        assert missing.state == "problem"
        s3.client().create_bucket(Bucket="doctor")
        (there,) = doctor.object_store("s3://doctor/bundles")
        assert (there.state, there.found) == ("ok", f"s3://doctor/bundles at {weed}")
    finally:
        s3.client.cache_clear()
        s3.session.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@127.0.0.1:9")
    (down,) = doctor.object_store("s3://doctor/bundles")
    assert down.state == "problem"
    assert "secret" not in str(down)


def test_data_sets_that_are_there_in_part_are_told_with_the_command_that_fetches_the_rest(tmp_path: Path) -> None:
    (none,) = doctor.data_sets(tmp_path)
    assert (none.state, none.fix) == ("warning", f"svip fetch NAME --root {tmp_path}")
    photos = tmp_path / "CUB_200_2011" / "images" / "001.Wren"
    photos.mkdir(parents=True)
    (photos / "a.jpg").touch()
    (cub,) = doctor.data_sets(tmp_path)
    assert (cub.name, cub.found) == ("cub", "1 photos, no splits")
    assert cub.fix == f"svip fetch cub --root {tmp_path}"


def test_the_command_shows_a_fix_and_fails_where_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    well = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "100"})
    assert well.exit_code == 0, well.output
    assert "working folder" in well.output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    ill = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "100"})
    assert ill.exit_code == 1
    assert "-> is the server up" in ill.output
    assert "1 problem" in ill.output
    found = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout)
    assert [finding["name"] for finding in found if finding["state"] == "problem"] == ["MLflow"]


def test_a_container_is_told_that_it_needs_no_docker_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # what every pod has
    (finding,) = doctor.docker_engine()
    assert (finding.state, finding.found) == ("ok", "no engine, and none is needed: this is a container")
