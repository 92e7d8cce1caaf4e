"""``svip pipeline submit`` and what follows it, against a server on loopback whose runs really execute."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_user import OPTIONS, TRACKED, Cluster, Done, ended, until
from kfp_server import StubRun

from pipelines.cluster_cli import run_name
from pipelines.server import Server, shown

TOKEN = "a-token-that-nobody-may-see"
CLUSTER = f"""
image: registry.example/svip:7
service_account: svip-pipeline
{TRACKED}
"""
FILE = ("--cluster", "cluster.yaml")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.server.end()


@dataclass
class Story:
    """A run that was submitted and followed, left with Ctrl-C, stopped, and resubmitted with success."""

    cluster: Cluster
    left: Done
    state_when_left: str
    stopped: Done
    followed: Done
    resubmitted: Done
    first: StubRun
    second: StubRun


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The server goes away for a while while the second run is followed."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), token=TOKEN)
    (cluster.folder / "cluster.yaml").write_text(CLUSTER)
    try:
        arguments = ["submit", "experiment", *FILE, "--wait", *OPTIONS]
        process = cluster.start(*arguments, SVIP_KFP_TOKEN=TOKEN)
        until(lambda: bool(cluster.server.runs) and cluster.last.tasks().get("evaluate") == "RUNNING")
        first = cluster.last
        time.sleep(1)  # for svip to see it too
        process.send_signal(signal.SIGINT)
        left = ended(process)
        state = first.state()
        stopped = cluster.svip("stop", first.id, SVIP_KFP_TOKEN=TOKEN)
        followed = cluster.svip("status", first.id, "--wait", SVIP_KFP_TOKEN=TOKEN)

        process = cluster.start("resubmit", first.id, "--wait", SVIP_KFP_TOKEN=TOKEN)
        until(lambda: cluster.last is not first and "evaluate" in cluster.last.tasks())
        cluster.server.close()
        time.sleep(1)
        cluster.server.listen()
        yield Story(cluster, left, state, stopped, followed, ended(process), first, cluster.last)
    finally:
        cluster.server.end()


@pytest.mark.slow
def test_a_run_is_followed_step_by_step_across_a_lost_connection(story: Story) -> None:
    done, run, host = story.resubmitted, story.second, story.cluster.server.host
    assert done.code == 0, done.out + done.err + "\n".join(run.log())
    assert done.err == ""
    assert done.out.startswith(f"run {run.id}\n{host}/#/runs/details/{run.id}\n")
    steps = ("open-run", "prepare-data", "embed-attributes", "train", "evaluate", "report", "close-run")
    ends = [done.out.index(f" {step}: succeeded after ") for step in steps]
    assert ends == sorted(ends)
    assert f"{host} does not answer (" in done.out
    assert "the run goes on, trying again" in done.out
    assert "the server answers again" in done.out
    assert "driver" not in done.out
    assert done.out.endswith(f"run {run.id} succeeded\n")
    (metrics,) = (run.folder / "artifacts").glob("*/evaluate/evaluation/metrics.json")
    assert json.loads(metrics.read_text())["protocols"]["validation"]["T1"] >= 0


@pytest.mark.slow
def test_ctrl_c_leaves_the_run_going_and_says_how_to_follow_it(story: Story) -> None:
    assert (story.left.code, story.left.err, story.state_when_left) == (130, "", "RUNNING")
    assert "train: succeeded after" in story.left.out
    assert f"the run goes on; follow it with: svip pipeline status {story.first.id} --wait" in story.left.out


@pytest.mark.slow
def test_a_stopped_run_is_told_from_a_failed_one(story: Story) -> None:
    assert story.stopped.out == f"stopping {story.first.id}\n"
    assert (story.followed.code, story.followed.err) == (1, f"error: run {story.first.id} was stopped\n")


@pytest.mark.slow
def test_a_resubmitted_run_does_not_train_again_and_goes_on_in_the_same_mlflow_run(story: Story) -> None:
    first, second = story.first, story.second
    assert second.body["display_name"] == f"{first.body['display_name']} again"
    parameters = {"preset": "smoke", "overrides": OPTIONS}
    assert first.body["runtime_config"]["parameters"] == parameters
    assert second.body["runtime_config"]["parameters"] == {**parameters, "continues": first.id}
    assert not list((second.folder / "artifacts").glob("*/train/checkpoint")), "training came from the cache"
    runs = story.cluster.mlflow()
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert (parent.data.tags["pipeline"], parent.info.status) == (f"experiment-{second.id}", "FINISHED")
    assert [run.data.tags.get("step") for run in runs].count("train") == 1


@pytest.mark.slow
def test_what_was_sent_says_what_runs_and_holds_no_secret(story: Story) -> None:
    experiments, everything = story.cluster.server.experiments, ""
    for body, done in ((story.first.body, story.left), (story.second.body, story.resubmitted)):
        assert [one["display_name"] for one in experiments] == ["svip/synthetic"]
        assert body["experiment_id"] == experiments[0]["experiment_id"]
        assert re.match(r"experiment smoke depth=1 embed_dim=32 .* 20\d\d-\d\d-\d\d \d\d:\d\d", body["display_name"])
        assert body["service_account"] == "svip-pipeline"
        spec = body["pipeline_spec"]["pipeline_spec"]
        images = {one["container"]["image"] for one in spec["deploymentSpec"]["executors"].values()}
        assert images == {"registry.example/svip:7"}
        assert "svip-mlflow" in json.dumps(body["pipeline_spec"]["platform_spec"])
        everything += done.out + done.err + json.dumps(body)
    assert TOKEN not in everything


@pytest.mark.slow
def test_status_is_a_table_and_json(story: Story) -> None:
    cluster, run_id = story.cluster, story.second.id
    told = cluster.svip("status", run_id, "--json", SVIP_KFP_TOKEN=TOKEN)
    run = json.loads(told.out)
    assert (run["id"], run["state"], run["error"]) == (run_id, "SUCCEEDED", "")
    assert {task["name"]: task["state"] for task in run["tasks"]}["train"] == "SUCCEEDED"
    assert all(task["seconds"] >= 0 for task in run["tasks"])
    (cluster.folder / "token").write_text(f"{TOKEN}\n")
    table = cluster.svip("status", run_id, "--token-file", "token").out
    assert re.search(r"│ train +│ succeeded │ \d+ s", table)


@pytest.mark.slow
def test_logs_are_those_of_the_step_that_was_asked_for(story: Story) -> None:
    cluster, run = story.cluster, story.first.id
    config = {
        "current-context": "stub",
        "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me"}}],
        "clusters": [{"name": "stub", "cluster": {"server": cluster.server.host}}],
        "users": [{"name": "me", "user": {"token": TOKEN}}],
    }
    path = cluster.folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    done = cluster.svip("logs", run, "--step", "train", KUBECONFIG=str(path))
    assert done.code == 0, done.err
    assert done.out.startswith(f"== train ({run[:8]}-train)\n")
    assert "select epoch 1" in done.out
    assert "== evaluate" not in done.out
    everything = cluster.svip("logs", run, KUBECONFIG=str(path)).out
    assert [line.split()[1] for line in everything.splitlines() if line.startswith("== ")][-1] == "evaluate"
    missing = cluster.svip("logs", run, "--step", "tune", KUBECONFIG=str(path))
    assert missing.code == 1
    assert f"namespace svip has no pod of step tune of run {run}; there are: data_settings, embed_" in missing.err
    nowhere = cluster.svip("logs", run, KUBECONFIG=str(cluster.folder / "none"))
    assert "no cluster is configured" in nowhere.err and nowhere.err.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_succeeded_is_not_resubmitted(story: Story) -> None:
    done = story.cluster.svip("resubmit", story.second.id, SVIP_KFP_TOKEN=TOKEN)
    assert done.code == 1
    assert "is SUCCEEDED; only one that failed or was stopped is resubmitted" in done.err
    assert len(story.cluster.server.runs) == 2


@pytest.mark.slow
def test_a_run_that_fails_ends_with_code_1_the_step_and_what_to_do(cluster: Cluster) -> None:
    done = cluster.svip("submit", "experiment", *FILE, "--wait", *OPTIONS, "data.dataset=cub", "data.root=nowhere")
    run = cluster.last.id
    assert done.code == 1
    assert "prepare-data: failed after " in done.out
    assert done.err.startswith(f"error: run {run} failed in prepare-data: one or more tasks failed; ")
    assert f"see `svip pipeline logs {run} --step prepare-data`; `svip pipeline resubmit {run}` goes on" in done.err
    assert done.err.count("\n") == 1
    (parent,) = cluster.mlflow()
    assert parent.info.status == "FAILED"


def test_a_wrong_configuration_or_option_is_refused_before_anything_is_sent(cluster: Cluster) -> None:
    (cluster.folder / "own.yaml").write_text("data: {}\n")
    (cluster.folder / "untracked.yaml").write_text("steps: {train: {env: {MLFLOW_TRACKING_URI: http://mlflow}}}\n")
    for arguments, message in (
        (
            ["experiment", "-p", "own.yaml"],
            "preset own.yaml: a cluster's steps don't see this file; give a shipped one",
        ),
        (["experiment", "optim.epoch=1"], "did you mean 'optim.epochs'?"),
        (["experiment", *FILE, "--seeds", "2"], "pipeline experiment has no seeds; leave out --seeds"),
        (
            ["experimint", *FILE],
            "unknown pipeline 'experimint'; did you mean 'experiment'? there are: experiment, ablation",
        ),
        (["experiment", "--cluster", "none.yaml"], "cluster file none.yaml does not exist"),
        (["experiment"], "no cluster file: the steps are told no MLflow server"),
        (
            ["experiment", "--cluster", "untracked.yaml"],
            "give --cluster FILE with MLFLOW_TRACKING_URI in steps.default.env or steps.default.secrets, as ",
        ),
    ):
        done = cluster.svip("submit", *arguments)
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1
    assert cluster.server.seen == []


def test_a_server_that_refuses_is_explained_in_one_line(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, token=TOKEN, namespace="team")
    try:
        told = {
            (
                "status",
                "x",
            ): "no valid token (401); give a token (SVIP_KFP_TOKEN, --token-file). It says: Request header",
            ("status", "x", "--token", "wrong"): "no valid token (401)",
            ("status", "x", "--token-file", "gone"): "token file gone can't be read: No such file or directory",
            ("status", "x", "--token", TOKEN): f"{cluster.server.host} has no run x",
            ("submit", "experiment", *FILE, "--token", TOKEN, "--namespace", "other"): (
                "not allowed in namespace other (403); give a token (SVIP_KFP_TOKEN, --token-file). "
                "It says: User 'me' is not authorized with reason: namespace other"
            ),
            ("status", "x", "--host", "http://127.0.0.1:1"): "http://127.0.0.1:1 does not answer (",
        }
        for arguments, message in told.items():
            done = cluster.svip(*arguments)
            assert done.code == 1
            assert message in done.err, arguments
            assert done.err.count("\n") == 1, done.err
            assert TOKEN not in done.out + done.err
        assert not cluster.server.runs
    finally:
        cluster.server.end()


def test_without_a_host_it_is_said_how_to_get_one(cluster: Cluster) -> None:
    done = cluster.svip("status", "x", KF_PIPELINES_ENDPOINT="")
    assert done.err.startswith("error: no server: give --host, KF_PIPELINES_ENDPOINT or `host` of the cluster file")


def test_a_page_that_is_not_kubeflows_api_is_told_from_it() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if "login" in self.headers.get("Host", "") else 200)
            self.end_headers()
            self.wfile.write(b"<html>Welcome</html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{listener.server_address[1]}"
        with pytest.raises(RuntimeError, match=r"is not Kubeflow Pipelines' API \(200\); is the address right\?"):
            Server(address)
        listener.shutdown()


def test_a_token_that_expires_while_a_run_is_followed_is_read_anew(cluster: Cluster) -> None:
    cluster.server.token = "old"
    token = cluster.folder / "token"
    token.write_text("old")
    server = Server(cluster.server.host, token=lambda: token.read_text())
    cluster.server.start({"pipeline_spec": {"root": {"dag": {"tasks": {}}}}, "runtime_config": {}, "display_name": "x"})
    assert server.run(cluster.last.id).name == "x"
    cluster.server.token = "new"
    token.write_text("new")
    assert server.run(cluster.last.id).name == "x"


def test_a_run_that_is_resubmitted_twice_goes_on_with_the_first(cluster: Cluster) -> None:
    task = {"inputDefinitions": {"parameters": {"continues": {"parameterType": "STRING"}}}, "dag": {"tasks": {}}}
    spec = {"pipelineInfo": {"name": "x"}, "schemaVersion": "2.1.0", "sdkVersion": "kfp", "root": task}
    cluster.server.start({"pipeline_spec": spec, "runtime_config": {}, "display_name": "x", "experiment_id": "1"})
    server, told = Server(cluster.server.host), []
    for _ in range(2):
        first = cluster.last
        cluster.server.terminate(first)
        server.resubmit(first.id)
        told.append(cluster.last.body["runtime_config"]["parameters"]["continues"])
    one, two, _ = cluster.server.runs
    assert told == [one, f"{two} {one}"]


def test_a_long_name_keeps_the_pipeline_the_preset_and_the_date() -> None:
    name = run_name("experiment", "paper/cub", [f"model.backbone_args.value{n}=12345678" for n in range(9)])
    assert len(name) == 100
    assert re.fullmatch(r"experiment paper/cub value0=12345678 .*\.\.\. 20\d\d-\d\d-\d\d \d\d:\d\d", name)


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0.4, "0 s"), (185, "3 min 05 s"), (7805, "2 h 10 min")])
def test_durations_are_for_people(seconds: float | None, text: str) -> None:
    assert shown(seconds) == text
