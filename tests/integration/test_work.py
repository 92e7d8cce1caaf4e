"""SVIP_WORK: a training that another pod, with an empty folder, takes up where the last one was lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from small_training import IMAGE_ROLES, TINY, write_bundle, write_vectors

from benchmarks.s3server import KEYS
from svip import steps
from svip.data import s3
from svip.data.bundle import Bundle
from svip.data.sources import Interrupted
from svip.training import loop
from svip.training.checkpoint import read_config
from svip.training.work import Place, workplace

OPTIONS = [*TINY, "train.checkpoint_steps=3"]
PARENT = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    bundle = write_bundle(folder / "bundle", IMAGE_ROLES)
    write_vectors(folder / "words", bundle)
    return bundle, folder / "words"


def train(inputs: tuple[Bundle, Path], out: str | Path, *overrides: str, **options: Any) -> dict[str, Any]:
    files = (str(inputs[0].path), str(inputs[1]), str(out))
    return steps.train(*files, "smoke", [*OPTIONS, *overrides], log_model=False, **options)


@pytest.fixture(scope="module")
def whole(inputs: tuple[Bundle, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted, without SVIP_WORK."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(inputs, out)
    return out


@pytest.fixture
def bucket(weed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": weed, "SVIP_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3.session.cache_clear()
    s3.client.cache_clear()
    name = f"work-{tmp_path.name[-20:].replace('_', '-')}"
    s3.client().create_bucket(Bucket=name)
    yield f"s3://{name}"
    s3.session.cache_clear()
    s3.client.cache_clear()


class Lost(Exception):
    """The pod is gone."""


def lost_after(monkeypatch: pytest.MonkeyPatch, checkpoints: int) -> None:
    """From the next training on, the pod is lost when so many checkpoints are where they are kept."""
    count, save = iter(range(1, 1000)), Place.save

    def saved(self: Place, finished: bool = False) -> None:
        save(self, finished)
        if next(count) == checkpoints:
            raise Lost

    monkeypatch.setattr(Place, "save", saved)


def assert_same(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    for name in ("model.safetensors", "select/best.safetensors"):
        found, expected = load_file(one / name), load_file(other / name)
        assert all(bool((found[key] == expected[key]).all()) for key in expected), name


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("checkpoints", [1, 3, 7])
def test_another_pod_goes_on_and_ends_with_the_same_model_bit_for_bit(
    kind: str,
    checkpoints: int,
    inputs: tuple[Bundle, Path],
    whole: Path,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    work = str(tmp_path / "work") if kind == "folder" else f"{request.getfixturevalue('bucket')}/work"
    monkeypatch.setenv("SVIP_WORK", work)
    with monkeypatch.context() as patch:
        lost_after(patch, checkpoints)
        with pytest.raises(Lost):
            train(inputs, tmp_path / "first", parent_run_id=PARENT)
    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (first,) = client.search_runs(experiments, "tags.error LIKE 'Lost%'")
    assert first.info.status == "FAILED"
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # another machine
    result = train(inputs, tmp_path / "second", parent_run_id=PARENT)
    assert_same(tmp_path / "second", whole)
    run = client.get_run(result["run_id"])
    assert run.info.run_id == first.info.run_id, "it is the run of the first pod"
    assert run.info.status == "FINISHED" and "error" not in run.data.tags
    left = s3.names(work) if kind == "bucket" else sorted(files(tmp_path / "work"))
    assert not left and not (kind == "bucket" and files(tmp_path / "cache"))
    assert train(inputs, tmp_path / "second", parent_run_id=PARENT) == result, "and run again, nothing is done"


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_training_that_was_handed_over_in_part_is_handed_over_again(
    kind: str,
    inputs: tuple[Bundle, Path],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    work = str(tmp_path / "work") if kind == "folder" else f"{request.getfixturevalue('bucket')}/work"
    monkeypatch.setenv("SVIP_WORK", work)

    def stopped(target: Path, *_: Any) -> None:
        if target.name == "model.json":
            raise Lost
        target.touch()

    with monkeypatch.context() as patch:
        patch.setattr("svip.training.work.write_atomically", stopped)
        with pytest.raises(Lost):
            train(inputs, tmp_path / "run")
    assert files(tmp_path / "run") == files(whole) - {"model.json"}
    monkeypatch.setattr("svip.training.loop.train_step", None)  # not one step again
    train(inputs, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_finished_training_that_is_kept_is_not_made_again_for_the_next_run_of_a_pipeline(
    inputs: tuple[Bundle, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVIP_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("SVIP_WORK_KEEP", "1")
    first = train(inputs, tmp_path / "one", parent_run_id=PARENT)
    monkeypatch.setattr(loop, "train_step", None)
    assert train(inputs, tmp_path / "two", "evaluation.eszsl=false", parent_run_id=PARENT) == first
    assert_same(tmp_path / "one", tmp_path / "two")
    evaluated = [read_config(tmp_path / name).evaluation.eszsl for name in ("one", "two")]
    assert evaluated == [True, False], "each is evaluated as its run of the pipeline was asked to"
    assert_same(tmp_path / "two", whole)


@pytest.mark.slow
def test_several_processes_may_train_into_a_bucket(inputs: tuple[Bundle, Path], whole: Path, bucket: str) -> None:
    result = train(inputs, f"{bucket}/model", processes=2)
    assert result["run_id"] and set(s3.names(f"{bucket}/model")) == files(whole)


def test_out_may_be_a_bucket_and_holds_the_finished_model(
    inputs: tuple[Bundle, Path], whole: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lost_after(patch, 4)
        with pytest.raises(Lost):
            train(inputs, f"{bucket}/model")
    result = train(inputs, f"{bucket}/model")
    assert set(s3.names(f"{bucket}/model")) == files(whole)
    for name in s3.names(f"{bucket}/model"):
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        s3.fetch(f"{bucket}/model/{name}", tmp_path / "got" / name)
    assert_same(tmp_path / "got", whole)
    assert not files(tmp_path / "cache"), "nothing of it is left on this machine"
    assert train(inputs, f"{bucket}/model") == result
    with pytest.raises(FileExistsError, match="is not empty; resume it"):
        train(inputs, f"{bucket}/model", resume=False)


def test_each_run_of_a_pipeline_has_a_place_of_its_own() -> None:
    from svip.config import load_config

    config, other = load_config("smoke"), load_config("smoke", ["optim.lr=0.5"])
    elsewhere = load_config(
        "smoke", ["train.device=cuda", "train.workers=3", "data.root=/mnt", "evaluation.eszsl=false"]
    )
    places = {
        workplace("s3://team/work/", "/out", "parent", "", config),
        workplace("s3://team/work", "/elsewhere", "parent", "", config),  # the same: another pod of the same step
        workplace("s3://team/work", "/out", "parent", "", elsewhere),  # the same: it changes no number of the training
        workplace("s3://team/work", "/out", "parent", "", other),
        workplace("s3://team/work", "/out", "parent", "no_psc:1", config),
        workplace("s3://team/work", "/out", "another", "", config),
        workplace("s3://team/work", "/out", "", "", config),
        workplace("s3://team/work", "/elsewhere", "", "", config),  # alone, it is the folder that counts
    }
    assert len(places) == 6
    assert all(place.startswith("s3://team/work/") and ":" not in place[5:] for place in places)


def test_a_bucket_that_is_away_for_a_while_costs_nothing_but_the_last_write_has_to_arrive(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(f"{bucket}/model")
    place.fetch()
    place.folder.mkdir(parents=True)
    (place.folder / "first").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(s3, "upload", away)
        place.save()
        assert "training goes on" in caplog.text
        with pytest.raises(Interrupted):
            place.save(finished=True)
    (place.folder / "second").write_text("2")
    place.save()
    assert sorted(s3.names(f"{bucket}/model")) == ["first", "second"]
    (place.folder / "first").unlink()
    (place.folder / ".second.part").write_text("half")
    place.save()
    assert s3.names(f"{bucket}/model") == ["second"]


def away(*_: Any) -> None:
    raise Interrupted("the bucket is away")


def test_out_may_end_with_a_slash_and_is_not_taken_for_another_place(
    inputs: tuple[Bundle, Path], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    assert train(inputs, f"{tmp_path / 'run'}/")["run_id"]
    assert_same(tmp_path / "run", whole)


def test_what_was_begun_in_out_goes_on_there(
    inputs: tuple[Bundle, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lost_after(patch, 2)
        with pytest.raises(Lost):
            train(inputs, tmp_path / "run")
    monkeypatch.setenv("SVIP_WORK", str(tmp_path / "work"))
    train(inputs, tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    assert not (tmp_path / "work").exists()
    assert json.loads((tmp_path / "run" / "model.json").read_text())["epochs"] >= 1
