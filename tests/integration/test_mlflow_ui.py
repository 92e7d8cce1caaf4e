"""What a person sees of tracked runs in MLflow's pages: a real server, real runs, a real browser without a screen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait
from small_training import ATTRIBUTES, IMAGE_ROLES, TINY, write_bundle

from svip import steps
from svip.config import load_config, to_yaml
from svip.semantics.vectors import Embedding, write_embedding

pytestmark = pytest.mark.slow

CHANGED = (["optim.lr=1e-5"], ["optim.lr=0.01", "model.selected_groups=4"], ["optim.lr=0.01", "train.seed=1"])
"""What the three pipeline runs change of the preset ``tiny``."""
NAMES = ("lr=1e-5", "M=4 lr=0.01", "lr=0.01 seed=1")
PATIENCE = 180
"""Seconds to wait for what a page should show; on a busy machine its scripts take many."""


@dataclass(frozen=True)
class Runs:
    """A server, and the pipeline runs in its store."""

    address: str
    client: MlflowClient
    experiment: str
    parents: list[str]

    def child(self, parent: str, step: str) -> Run:
        query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.step = '{step}'"
        (run,) = self.client.search_runs([self.experiment], query)
        return run

    def h(self, run_id: str) -> str:
        """The run's honest H as MLflow's pages write it, in part."""
        return f"{self.client.get_run(run_id).data.metrics['test/H']:.6g}"[:5]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Three small pipeline runs, made by the steps themselves, and a server that shows them."""
    folder = tmp_path_factory.mktemp("ui")
    uri, preset = f"sqlite:///{folder}/mlflow.db", str(folder / "tiny.yaml")
    Path(preset).write_text(to_yaml(load_config("smoke", [*TINY, "optim.epochs=2"])))
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    vectors = np.random.default_rng(1).normal(size=(ATTRIBUTES, 7)).astype(np.float32)
    write_embedding(Embedding(vectors, bundle.attribute_names, {}), folder / "words")
    data, parents = str(bundle.path), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for number, changed in enumerate(CHANGED):
            run, test, page = (str(folder / str(number) / name) for name in ("run", "test", "report"))
            parent = steps.open_run(f"experiment-{number}", preset, changed)
            steps.train(data, str(folder / "words"), run, preset, changed, parent, log_model=number == 0)
            steps.evaluate(run, data, test, parent)
            steps.report(test, run, data, page, parent)
            steps.close_run(parent, "FINISHED")
            parents.append(parent)
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'svip/synthetic'")
    with served(uri, folder / "server.log") as address:
        yield Runs(address, client, experiment.experiment_id, parents)


@contextmanager
def served(uri: str, log: Path) -> Iterator[str]:
    """MLflow's server on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--workers", "1"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # it starts processes of its own
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


class Browser:
    """Chromium without a screen, on the pages of one server."""

    def __init__(self, driver: Chrome, address: str, shots: Path) -> None:
        self.driver, self.address, self.shots = driver, address, shots

    def open(self, page: str, *expected: str) -> str:
        """Go to a page and wait until it shows all the texts; what it shows."""
        self.driver.get("about:blank")  # a new address after the # loads nothing
        self.driver.get(f"{self.address}/#{page}")
        return self.shows(page, *expected)

    def shows(self, page: str, *expected: str) -> str:
        """Wait until the page shows all the texts; what it shows. Leaves a picture of it."""
        try:
            WebDriverWait(self.driver, PATIENCE, 0.5).until(lambda _: not self._missing(expected))
        except TimeoutException:
            raise AssertionError(f"{page} does not show {self._missing(expected)}, but:\n{self._text()}") from None
        finally:
            name = "-".join(filter(str.isalnum, (part[:12] for part in page.split("/")))) or "page"
            self.driver.save_screenshot(str(self.shots / f"{name}.png"))
        return self._text()

    def _missing(self, expected: tuple[str, ...]) -> list[str]:
        text = self._text()
        return [part for part in expected if part not in text]

    def _text(self) -> str:
        return str(self.driver.execute_script("return document.body ? document.body.innerText : ''"))


@pytest.fixture(scope="module")
def browser(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1700,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    shots = Path(os.environ.get("SVIP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    driver = Chrome(options=options, service=ChromeService(str(programs[1])))
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield Browser(driver, runs.address, shots)
    finally:
        driver.quit()
