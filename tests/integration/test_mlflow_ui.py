"""What a person sees of tracked runs, compared and in MLflow's pages: real runs, a real server, a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.ui import WebDriverWait
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors

from benchmarks.mlflowserver import MORTAL
from benchmarks.ports import free_port
from svip import steps
from svip.config import load_config, to_yaml

pytestmark = pytest.mark.slow

CHANGED = (["optim.lr=1e-5"], ["optim.lr=0.01", "model.selected_groups=4"], ["optim.lr=0.01", "train.seed=1"])
"""What the three pipeline runs change of the preset ``tiny``."""
NAMES = ("lr=1e-5", "M=4 lr=0.01", "lr=0.01 seed=1")
ROLES = {
    role: [*roles, *["test_unseen" if role == "test_unseen" else "test_seen"] * 4]
    for role, roles in IMAGE_ROLES.items()
}
"""More images to test on, so that accuracies are no round numbers."""
PATIENCE = 120
"""Seconds to wait for what a page should show; on a busy machine its scripts take many."""


@dataclass(frozen=True)
class Runs:
    """A store with pipeline runs."""

    uri: str
    client: MlflowClient
    experiment: str
    parents: list[str]

    def child(self, parent: str, step: str) -> Run:
        query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.step = '{step}'"
        (run,) = self.client.search_runs([self.experiment], query)
        return run

    def reached(self, run_id: str, name: str = "H") -> float:
        """One of the run's honest numbers."""
        return float(self.client.get_run(run_id).data.metrics[f"test/{name}"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Three small pipeline runs, made by the steps themselves."""
    folder = tmp_path_factory.mktemp("ui")
    uri, preset = f"sqlite:///{folder}/mlflow.db", str(folder / "tiny.yaml")
    Path(preset).write_text(to_yaml(load_config("smoke", [*TINY, "optim.epochs=2"])))
    bundle = write_bundle(folder / "bundle", ROLES)
    write_vectors(folder / "words", bundle)
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
    return Runs(uri, client, experiment.experiment_id, parents)


@contextmanager
def served(uri: str, log: Path) -> Iterator[str]:
    """MLflow's server on a free port of this machine; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*MORTAL, *command, "--host", "127.0.0.1", "--workers", "1"],
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

    def expand_rows(self) -> None:
        """Press all arrows before runs that hold others."""
        for button in self.driver.find_elements(By.CSS_SELECTOR, "button[data-component-id*='runnamecellrenderer']"):
            self.driver.execute_script("arguments[0].click()", button)

    def has_image(self) -> None:
        """Wait until the page shows a picture."""
        script = "return [...document.images].some(image => image.naturalWidth > 300 && image.offsetWidth > 100)"
        WebDriverWait(self.driver, PATIENCE, 0.5).until(lambda driver: driver.execute_script(script))
        self.driver.save_screenshot(str(self.shots / "image.png"))

    def has_frame(self, expected: str) -> None:
        """Wait until a page within the page shows the text."""
        wait = WebDriverWait(self.driver, PATIENCE, 0.5)
        wait.until(expected_conditions.frame_to_be_available_and_switch_to_it((By.TAG_NAME, "iframe")))
        wait.until(lambda _: expected in self._text())
        self.driver.switch_to.default_content()
        self.driver.save_screenshot(str(self.shots / "frame.png"))

    def _missing(self, expected: tuple[str, ...]) -> list[str]:
        text = self._text()
        return [part for part in expected if part not in text]

    def _text(self) -> str:
        """What the page shows, with single spaces."""
        return " ".join(self.driver.execute_script("return document.body ? document.body.innerText : ''").split())


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
    with served(runs.uri, tmp_path_factory.mktemp("server") / "log") as address:
        driver = Chrome(options=options, service=ChromeService(str(programs[1])))
        driver.set_page_load_timeout(PATIENCE)
        try:
            yield Browser(driver, address, shots)
        finally:
            driver.quit()


def test_the_steps_leave_names_changes_and_pictures(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for parent, name, changed in zip(runs.parents, NAMES, CHANGED, strict=True):
        whole, train, test = (runs.client.get_run(parent), runs.child(parent, "train"), runs.child(parent, "evaluate"))
        assert whole.info.run_name == f"experiment tiny {name}"
        assert (train.info.run_name, test.info.run_name) == (f"train-svip {name}", f"evaluate-svip {name}")
        for run in (whole, train, test):
            assert set(run.data.tags["changes"].split(", ")) == {text.replace("1e-5", "1e-05") for text in changed}
            assert run.data.tags["preset"].endswith("tiny.yaml")
        for run in (whole, test):
            assert f"| {run.data.metrics['test/H']:.1f} |" in run.data.tags["mlflow.note.content"].replace("**", "")
        charts = [
            {file.path for file in runs.client.list_artifacts(run.info.run_id, "charts")} for run in (train, test)
        ]
        assert charts == [
            {"charts/losses.png", "charts/validation.png"},
            {
                f"charts/{name}.png"
                for name in ("seen_classes", "unseen_classes", "seen_unseen_curve", "unseen_confusions")
            },
        ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.uri)
    compared = steps.compare([runs.parents[0], f"experiment tiny {NAMES[1]}", runs.parents[2][:10]], out=str(tmp_path))
    assert [set(line.differing) for line in compared.lines] == [{"M", "lr", "seed"}] * 3
    for line in compared.lines:
        assert line.intervals["H"].value == pytest.approx(line.entry.numbers["H"]), "from the scores, as evaluated"


def test_the_page_of_an_experiment_nests_steps_in_pipelines_named_by_what_they_change(
    runs: Runs, browser: Browser
) -> None:
    browser.open(f"/experiments/{runs.experiment}/runs", *(f"experiment tiny {name}" for name in NAMES))
    browser.expand_rows()
    steps_of = [f"{step}-svip {name}" for step in ("train", "evaluate") for name in NAMES]
    browser.shows("experiment", *steps_of)


def test_the_comparison_of_three_runs_has_their_names_changes_and_h(runs: Runs, browser: Browser) -> None:
    chosen = [runs.child(parent, "evaluate").info.run_id for parent in runs.parents]
    page = f'/compare-runs?runs={json.dumps(chosen)}&experiments=["{runs.experiment}"]'
    changes = ["optim.lr=1e-05", "model.selected_groups=4, optim.lr=0.01", "optim.lr=0.01, train.seed=1"]
    shown = browser.open(page, *(f"evaluate-svip {name}" for name in NAMES), "test/H", " ".join(["changes", *changes]))
    metrics = shown[shown.index("Show diff only", shown.index("Metrics", shown.index("Parameters Show"))) :]
    for run_id in chosen:  # the page rounds
        assert f"{int(100 * runs.reached(run_id)) / 100:g}"[:4] in metrics, metrics


def test_the_page_of_an_evaluation_has_its_results_and_its_pictures(runs: Runs, browser: Browser) -> None:
    run = runs.child(runs.parents[1], "evaluate")
    page = f"/experiments/{runs.experiment}/runs/{run.info.run_id}"
    shown = browser.open(
        page, f"evaluate-svip {NAMES[1]}", "gamma chosen on the validation classes", "test/H", "changes"
    )
    number = re.search(r"test/H\s+(\S+)", shown)
    assert number and float(number[1]) == pytest.approx(runs.reached(run.info.run_id))
    browser.shows(page, "synthetic-standard (", "bundle_sha256")
    browser.open(f"{page}/artifacts/charts/unseen_confusions.png", "unseen_confusions.png")
    browser.has_image()


def test_the_page_of_a_pipeline_shows_its_report(runs: Runs, browser: Browser) -> None:
    page = f"/experiments/{runs.experiment}/runs/{runs.parents[0]}/artifacts/report.html"
    browser.open(page, "report.html")
    browser.has_frame("How to read the numbers")


def test_the_page_of_a_training_links_its_model(runs: Runs, browser: Browser) -> None:
    run = runs.child(runs.parents[0], "train")
    browser.open(f"/experiments/{runs.experiment}/runs/{run.info.run_id}", f"train-svip {NAMES[0]}", "val/H", "model")
    (model,) = runs.client.search_logged_models([runs.experiment])
    page = f"/experiments/{runs.experiment}/models/{model.model_id}"
    shown = browser.open(page, f"train-svip {NAMES[0]}", "test/H")
    assert f"{runs.reached(runs.child(runs.parents[0], 'evaluate').info.run_id):g}"[:4] in shown


def test_the_page_of_a_registered_version_says_what_it_reached(
    runs: Runs, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.uri)
    registration = steps.register(runs.parents[0])
    page = f"/models/{registration.name}/versions/{registration.version}"
    browser.open(page, "champion", "champion: the first version", f"{registration.h.value:.2f}", "validation")
    (model,) = runs.client.search_logged_models([runs.experiment])
    browser.open(f"/experiments/{runs.experiment}/models/{model.model_id}", f"{registration.name} v1")
