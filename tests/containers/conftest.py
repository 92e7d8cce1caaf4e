"""Fixtures of the tests that need a Docker engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker import DockerClient
from docker_engine import built_image, running_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[str]:
    """The address (DOCKER_HOST) of a running engine."""
    folder = Path(tempfile.mkdtemp(prefix="svip-engine-"))  # short: a socket's path may have 107 characters
    try:
        with running_engine(folder) as host:
            yield host
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def image(engine: str) -> Iterator[str]:
    """The tag of the built cpu image; SVIP_TEST_IMAGE names one that the engine has already."""
    if there := os.environ.get("SVIP_TEST_IMAGE"):
        yield there
        return
    folder = Path(tempfile.mkdtemp(prefix="svip-image-"))
    try:
        with built_image(engine, folder) as tag:
            yield tag
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(engine: str) -> Iterator[DockerClient]:
    with contextlib.closing(docker.DockerClient(engine, timeout=300)) as made:
        yield made
