"""What is on its way to MLflow: the journals on disk, and what arrives of them in a real SQLite store."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run

from svip import tracking
from svip.tracking import TrackingError, open_tracker, outbox, sender, sync
from svip.tracking.delivery import Delivery
from svip.tracking.outbox import Busy, Journal
from svip.tracking.store import client_of, is_away

ID, REAL = "local-1", "ab" * 16
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # surrogates of odd file names too
CONTENTS = st.dictionaries(TEXT, TEXT | st.floats() | st.integers() | st.none(), max_size=3)
ENTRIES = st.lists(st.tuples(st.just("metrics"), CONTENTS) | st.just(("sent", {})), max_size=8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outbox of its own."""
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "outbox"))
    return tmp_path / "outbox"


def opened(journal: Journal, **changes: Any) -> Journal:
    content = {"run_id": "", "experiment": "svip/outbox", "run_name": "run", "parent": "", "tags": {}}
    journal.append("open", **{**content, "has_to_exist": False, "owns": True, "time": outbox.now(), **changes})
    return journal


def metric(journal: Journal, step: int, value: float = 1.0, key: str = "loss") -> None:
    journal.append("metrics", metrics={key: value}, step=step, time=1000 + step)


def history(store: str, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in MlflowClient(store).get_metric_history(run_id, key)]


def runs(store: str, experiment: str) -> list[Run]:
    client = MlflowClient(store)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


@settings(max_examples=150, deadline=None)
@given(entries=ENTRIES, cut=st.integers(0, 2000), after=CONTENTS)
def test_a_journal_cut_anywhere_has_all_whole_records(
    entries: list[tuple[str, dict[str, Any]]], cut: int, after: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.create(Path(folder), ID, "http://server")
        header = end = journal.path.stat().st_size
        lines: list[tuple[int, int, str, Any]] = []  # where each ends, what was acknowledged until then
        sent = 0
        for number, (kind, values) in enumerate(entries):
            if kind == "sent":
                sent = lines[-1][0] if lines else 0
                journal.acknowledge(sent, REAL)
            else:
                journal.append("metrics", values=values)
            end = journal.path.stat().st_size
            lines.append((end, sent, kind, values))
            assert number < len(entries)
        journal.close()
        size = header + min(cut, end - header)
        with journal.path.open("r+b") as file:
            file.truncate(size)

        whole = [line for line in lines if line[0] <= size]
        acknowledged = whole[-1][1] if whole else 0
        again = Journal.open(journal.path)
        expected = [values for end, _, kind, values in whole if kind == "metrics" and end > acknowledged]
        assert [repr(record.content["values"]) for record in again.pending()] == [repr(values) for values in expected]
        assert again.run_id == (REAL if any(kind == "sent" for _, _, kind, _ in whole) else "")
        again.append("metrics", values=after)  # not glued to a line without its end
        assert repr(again.pending()[-1].content["values"]) == repr(after)
        again.acknowledge(again.pending()[-1].end)
        assert not again.pending()
        again.remove()


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, ID, "")
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": math.inf, "d": 1 / 3}
    journal.append("metrics", metrics=values)
    assert journal.pending()[0].content["metrics"] == values
    journal.close()


def test_one_process_at_a_time_writes_to_a_journal(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, ID, "http://server")
    with pytest.raises(Busy):
        Journal.open(journal.path)
    assert Journal.find(tmp_path, ID, "http://server") is None
    second = Journal.create(tmp_path, ID, "http://server")
    assert second.path != journal.path
    second.remove()
    code = (
        f"from svip.tracking.outbox import Journal; from pathlib import Path; Journal.open(Path({str(journal.path)!r}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert "is being written to by a running process" in other.stderr
    journal.close()
    Journal.open(journal.path).remove()
    assert not tmp_path.exists()


def test_a_journal_is_found_by_both_ids_of_its_run(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, ID, "http://server")
    journal.acknowledge(0, REAL)
    journal.close()
    for run_id in (ID, REAL):
        found = Journal.find(tmp_path, run_id, "http://server")
        assert found is not None
        found.close()
    assert Journal.find(tmp_path, REAL, "http://another") is None
    assert Journal.find(tmp_path, "cd" * 16, "http://server") is None


def test_a_journal_of_another_user_stops_nobody() -> None:
    uid = os.geteuid()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        journal = Journal.create(folder, ID, "http://server")
        journal.close()
        folder.chmod(0o755)
        journal.path.chmod(0)
        try:
            if uid == 0:
                os.seteuid(65534)
            assert Journal.find(folder, ID, "http://server") is None
            (result,) = sync(folder)
        finally:
            os.seteuid(uid)
        assert result.problem == f"[Errno 13] Permission denied: '{journal.path}'"


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(TrackingError, match=r"other\.jsonl: the line that ends at byte 9 is damaged"):
        Journal.open(path)
    path.write_text("")
    with pytest.raises(TrackingError, match="is not a journal of format 1"):
        Journal.open(path)
    assert [result.problem for result in sync(tmp_path)] == [f"{path} is not a journal of format 1; remove it"]


def test_files_are_kept_as_they_were_and_large_ones_are_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(tmp_path / "outbox", ID, "")
    folder = tmp_path / "results"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "table.csv").write_text("first")
    (tmp_path / "large.bin").write_bytes(b"0" * 20)
    monkeypatch.setattr(outbox, "COPIED", 10)
    kept, large = journal.keep(folder), journal.keep(tmp_path / "large.bin")
    (folder / "below" / "table.csv").write_text("second")
    assert (journal.kept(kept) / "below" / "table.csv").read_text() == "first"
    assert journal.kept(kept).name == "results"
    assert journal.kept(large) == tmp_path / "large.bin"
    journal.remove()
    assert not (tmp_path / "outbox").exists() and (tmp_path / "large.bin").exists()


def test_records_whose_acknowledgement_was_lost_take_effect_once(store: str, folder: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "note.txt"
    artifact.write_text("of the run")
    journal = opened(Journal.create(folder, ID + "-lost", store), experiment="svip/lost", tags={"preset": "smoke"})
    journal.append("params", params={"lr": "0.1"})
    for step in range(50):
        metric(journal, step, math.nan if step == 7 else step / 3)
    journal.append("artifact", folder="", path=str(artifact))
    journal.append("end", status="FINISHED", time=2_000_000_000_000)
    unsent = tmp_path / "unsent.jsonl"
    shutil.copy(journal.path, unsent)
    delivery = Delivery(client_of(store), journal, new=True)
    while delivery.step():
        pass
    journal.remove()

    folder.mkdir()
    shutil.copy(unsent, folder)  # as if nothing of it had been acknowledged
    (result,) = sync(folder)
    (run,) = runs(store, "svip/lost")
    assert (result.run_id, result.sent, result.left, result.problem) == (run.info.run_id, 54, 0, "")
    assert [step for step, _ in history(store, run.info.run_id)] == list(range(50))
    assert math.isnan(history(store, run.info.run_id)[7][1])
    assert (run.info.status, run.info.end_time) == ("FINISHED", 2_000_000_000_000)
    assert run.data.params == {"lr": "0.1"}
    assert [file.path for file in MlflowClient(store).list_artifacts(run.info.run_id)] == ["note.txt"]
    assert not folder.exists()


def test_what_mlflow_refuses_stops_nothing_else(
    store: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = opened(Journal.create(folder, ID + "-refused", store), experiment="svip/refused")
    for step in range(9):
        metric(journal, step, key="no such: name!?" if step == 4 else "loss")
    journal.append("artifact", folder="", path=str(tmp_path / "removed.bin"))
    journal.append("end", status="FINISHED", time=outbox.now())
    journal.close()
    (result,) = sync(folder)
    assert (result.sent, result.left, result.refused) == (10, 0, 2)
    (run,) = runs(store, "svip/refused")
    assert [step for step, _ in history(store, run.info.run_id)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert run.info.status == "FINISHED"
    assert "no such: name!?" in caplog.text and "removed.bin" in caplog.text


def test_a_place_of_artifacts_that_cant_be_written_to_stops_nothing_else(
    store: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    MlflowClient(store).create_experiment("svip/unwritable", f"file://{tmp_path}/file/mlruns")
    first = opened(Journal.create(folder, "local-unwritable", store), experiment="svip/unwritable")
    first.append("artifact", folder="", **first.keep(tmp_path / "file"))
    metric(first, 1)
    first.append("model", checkpoint=str(tmp_path / "file"), name="model")
    first.append("end", status="FINISHED", time=outbox.now())
    second = opened(Journal.create(folder, "local-unwritten", store), experiment="svip/unwritable")
    for journal in (first, second):
        journal.close()
    assert [(result.sent, result.refused, result.problem) for result in sync(folder)] == [(3, 2, ""), (1, 0, "")]
    found = {run.data.tags["outbox_id"]: run.info for run in runs(store, "svip/unwritable")}
    assert (found["local-unwritable"].status, found["local-unwritten"].status) == ("FINISHED", "KILLED")
    assert history(store, found["local-unwritable"].run_id) == [(1, 1.0)]
    assert "goes without artifact" in caplog.text and "Not a directory" in caplog.text


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (PermissionError(13, "Permission denied"), False),
        (OSError(28, "No space left on device"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (requests.ConnectTimeout(), True),
        (requests.exceptions.ChunkedEncodingError(), True),
        (requests.exceptions.RetryError(), True),
        (EndpointConnectionError(endpoint_url="http://bucket"), True),
        (ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject"), False),
    ],
)
def test_what_says_that_a_server_is_away(error: Exception, away: bool) -> None:
    assert is_away(error) == away


def test_an_evaluation_names_its_training_also_where_that_arrives_later(store: str, tmp_path: Path) -> None:
    tags = {"step": "evaluate", "train_run_id": "local-trained-late"}
    early = opened(Journal.create(tmp_path / "early", "local-tested", store), experiment="svip/order", tags=tags)
    late = opened(Journal.create(tmp_path / "late", "local-trained-late", store), experiment="svip/order")
    for journal in (early, late):
        journal.append("end", status="FINISHED", time=outbox.now())
        journal.close()
        assert [result.problem for result in sync(journal.path.parent)] == [""]
    evaluation = tracking.find_evaluation("local-trained-late")
    assert evaluation is not None and evaluation.tags["outbox_id"] == "local-tested"


@pytest.mark.parametrize("parent_first", [True, False])
def test_a_child_finds_its_parent_whoever_arrives_first(store: str, tmp_path: Path, parent_first: bool) -> None:
    experiment = f"svip/nested-{parent_first}"
    parent = opened(Journal.create(tmp_path / "parent", f"local-p{parent_first}", store), experiment=experiment)
    child = opened(
        Journal.create(tmp_path / "child", f"local-c{parent_first}", store), experiment=experiment, parent=parent.id
    )
    late = opened(
        Journal.create(tmp_path / "late", parent.id, store),
        run_id=parent.id,
        experiment="",
        has_to_exist=True,
        owns=False,
    )
    late.append("tags", tags={"from": "a step"})
    for journal in (parent, child, late):
        journal.append("tags", tags={"name": journal.path.parent.name})
        journal.close()
    for place in ("parent", "child") if parent_first else ("child", "parent"):
        if place == "parent":
            (waiting,) = sync(tmp_path / "late")
            assert waiting.left == 3 and f"run {parent.id} is not in {store} yet" in waiting.problem
        assert [result.problem for result in sync(tmp_path / place)] == [""]
    assert [result.problem for result in sync(tmp_path / "late")] == [""]
    found = {run.data.tags.get("from", "child"): run for run in runs(store, experiment)}
    assert len(runs(store, experiment)) == 2
    assert found["child"].data.tags["mlflow.parentRunId"] == found["a step"].info.run_id


def test_a_run_whose_process_vanished_ends_as_killed_when_it_did(store: str, folder: Path) -> None:
    code = (
        "import os; from svip.tracking import open_tracker\n"
        "tracker = open_tracker('svip/vanished', 'train').__enter__()\n"
        "tracker.log_metrics({'loss': 1.0}, 1); print(tracker.run_id, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    run_id = done.stdout.strip()
    assert MlflowClient(store).get_run(run_id).info.status == "RUNNING"
    (result,) = sync(folder)
    assert result.run_id == run_id and not result.problem
    run = MlflowClient(store).get_run(run_id)
    assert run.info.status == "KILLED"
    ((_, value),) = history(store, run_id)
    (at,) = (entry.timestamp for entry in MlflowClient(store).get_metric_history(run_id, "loss"))
    assert (value, run.info.end_time) == (1.0, at)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_resumed_elsewhere_is_not_ended_by_what_its_killed_process_left(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    left = opened(Journal.create(folder, f"local-elsewhere-{finished}", store), experiment="svip/elsewhere")
    delivery = Delivery(client_of(store), left, new=True)
    while delivery.step():
        pass
    metric(left, 1)
    left.close()
    with monkeypatch.context() as patch:
        patch.setenv("SVIP_OUTBOX", str(tmp_path / "another"))
        resumed = open_tracker("svip/elsewhere", "train", run_id=left.run_id)
        if finished:
            with resumed:
                pass
    (result,) = sync(folder)
    assert (result.run_id, result.problem) == (resumed.run_id, "")
    assert MlflowClient(store).get_run(resumed.run_id).info.status == ("FINISHED" if finished else "RUNNING")
    assert history(store, resumed.run_id) == [(1, 1.0)]
    resumed.leave()


def test_what_an_earlier_process_kept_does_not_open_or_end_a_run_that_another_went_on_with(
    store: str, folder: Path
) -> None:
    with open_tracker("svip/late", "train") as tracker:
        pass
    late = opened(Journal.create(folder, tracker.run_id, store), run_id=tracker.run_id, time=1000)
    metric(late, 1)
    late.append("end", status="FAILED", time=2000)
    late.close()
    assert [result.problem for result in sync(folder)] == [""]
    assert MlflowClient(store).get_run(tracker.run_id).info.status == "FINISHED"
    assert history(store, tracker.run_id) == [(1, 1.0)]


def test_a_resumed_run_sends_first_what_its_killed_process_left(store: str, folder: Path) -> None:
    with open_tracker("svip/resumed", "train") as first:
        pass
    left = opened(Journal.create(folder, "local-resumed", store))
    left.acknowledge(left.pending()[-1].end, first.run_id)
    metric(left, 1)
    left.close()
    with open_tracker("svip/resumed", "train", run_id=first.run_id) as second:
        second.log_metrics({"loss": 1.0}, 2)
    assert second.run_id == first.run_id
    assert [step for step, _ in history(store, first.run_id)] == [1, 2]
    assert not folder.exists()


def test_the_outbox_is_empty_when_all_has_arrived(store: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker("svip/outbox", "train") as tracker:
        (journal,) = folder.glob("*.jsonl")
        tracker.log_metrics({"loss": 1.0}, 1)
        assert [(result.run_id, result.busy) for result in sync(folder)] == [(journal.stem, True)]
    assert not folder.exists()
    assert list(sync(folder)) == []


def test_a_deleted_run_keeps_its_records_until_it_is_restored(store: str, folder: Path) -> None:
    journal = opened(Journal.create(folder, "local-deleted", store), experiment="svip/deleted")
    delivery = Delivery(client_of(store), journal, new=True)
    assert delivery.step() and not delivery.step()
    MlflowClient(store).delete_run(journal.run_id)
    metric(journal, 1)
    journal.close()
    (result,) = sync(folder)
    assert (result.left, result.sent) == (1, 0)
    assert f"run {journal.run_id} was deleted in MLflow; restore it there" in result.problem
    MlflowClient(store).restore_run(journal.run_id)
    (result,) = sync(folder)
    assert (result.left, result.problem) == (0, "")
    assert history(store, journal.run_id) == [(1, 1.0)]


def test_an_outbox_that_cant_be_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SVIP_OUTBOX", str(tmp_path / "file" / "outbox"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert outbox.outbox_folder() == tmp_path / f"svip-outbox-{os.getuid()}"
    assert tracking.outbox_folder().parent == tmp_path


def test_a_pipeline_ends_its_run_although_the_server_does_not_know_it_yet(store: str, folder: Path) -> None:
    # as open_run leaves it without an answer; from then on the server is back
    journal = opened(
        Journal.create(folder, "local-unknown", store),
        experiment="svip/unknown",
        tags={"pipeline": "pipeline-81"},
        owns=False,
        reopen=False,
    )
    journal.close()
    tracking.close_run("pipeline-81", "FAILED")
    assert [run.info.status for run in runs(store, "svip/unknown")] == ["FAILED"]
    assert not folder.exists()


def test_a_pipeline_without_its_server_is_complete_after_a_sync(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    for name, value in {"FLUSH": 0.05, "SHORT_FLUSH": 0.05, "PAUSES": (0.01, 0.01)}.items():
        monkeypatch.setattr(sender, name, value)
    parent = tracking.open_run("pipeline-77", "svip/without", {"lr": 1}, {"preset": "smoke"})
    with open_tracker("svip/without", "train", parent_run_id=parent, tags={"step": "train"}) as tracker:
        tracker.log_metrics({"val/H": 40.0}, 3)
    tags = {"step": "evaluate", "train_run_id": tracker.run_id}
    with open_tracker("svip/without", "evaluate", parent_run_id=parent, tags=tags) as tested:
        pass
    (tmp_path / "report.html").write_text("<html>")
    tracking.log_to_run(parent, {"test/H": 41.0}, [tmp_path / "report.html"])
    tracking.close_run("pipeline-77", "SUCCEEDED")
    assert len(list(folder.glob("*.jsonl"))) == 3
    by_id = tracking.open_run("pipeline-78", "svip/without", {})
    tracking.close_run(by_id, "FAILED")
    assert [result.left > 0 for result in sync(folder)] == [True] * len(list(folder.glob("*.jsonl")))

    assert [result.problem for result in sync(folder, to=store)] == [""] * 4
    found = {run.data.tags["outbox_id"]: run for run in runs(store, "svip/without")}
    assert set(found) == {parent, tracker.run_id, tested.run_id, by_id}
    assert {key: run.info.status for key, run in found.items()} == {
        parent: "FINISHED",
        tracker.run_id: "FINISHED",
        tested.run_id: "FINISHED",
        by_id: "FAILED",
    }
    assert found[tracker.run_id].data.tags["mlflow.parentRunId"] == found[parent].info.run_id
    assert (found[parent].data.metrics, found[parent].data.params) == ({"test/H": 41.0}, {"lr": "1"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    trained, evaluated = (found[run.run_id].info.run_id for run in (tracker, tested))
    for run_id in (trained, tracker.run_id):  # the folder of the checkpoint still has the local one
        evaluation = tracking.find_evaluation(run_id)
        assert evaluation is not None and evaluation.run_id == evaluated
        assert tracking.read_run(run_id).run_id == trained
    both = tracking.find_runs(parent)
    assert both[0].run_id == trained and both[1] is not None and both[1].run_id == evaluated
    files = MlflowClient(store).list_artifacts(found[parent].info.run_id)
    assert [file.path for file in files] == ["report.html"]
    assert not folder.exists()
