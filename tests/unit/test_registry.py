"""Who becomes champion: evaluations written by hand, in a real SQLite registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus

from svip import steps, tracking
from svip.config import load_config, to_yaml
from svip.evaluation.intervals import Answers, Interval
from svip.evaluation.metrics import zero_shot_metrics
from svip.steps import registry
from svip.steps.registry import RegisterError

CLASSES, EACH = 6, 40
LABELS, UNSEEN = np.repeat(np.arange(CLASSES), EACH), np.array([4, 5])
NOISE = np.random.default_rng(0).normal(size=(CLASSES * EACH, CLASSES))


def scores(skill: float) -> np.ndarray:
    """The same noise for every model, so that a better one is right on the same images and more."""
    return NOISE + skill * np.eye(CLASSES)[LABELS]


def trained(
    store: str,
    folder: Path,
    skill: float,
    bundle: str = "b" * 64,
    protocol: str = "validation",
    model_status: LoggedModelStatus | None = LoggedModelStatus.READY,
) -> str:
    """The run of a training, with an evaluation beside it; its id."""
    client = MlflowClient(store)
    with tracking.open_tracker("svip/registry", "train", tags={"step": "train"}) as train:
        (folder / "config.yaml").write_text(to_yaml(load_config("smoke")))
        train.log_artifact(folder / "config.yaml")
    if model_status:
        experiment = client.get_run(train.run_id).info.experiment_id
        model = client.create_logged_model(experiment, "model", source_run_id=train.run_id)
        client.log_outputs(train.run_id, [LoggedModelOutput(model.model_id, 0)])
        if model_status != LoggedModelStatus.PENDING:  # as which it begins
            client.finalize_logged_model(model.model_id, model_status)
    tags = {"step": "evaluate", "train_run_id": train.run_id, "bundle_sha256": bundle, "protocol": protocol}
    with tracking.open_tracker("svip/registry", "evaluate", tags=tags) as evaluation:
        metrics = zero_shot_metrics(scores(skill), LABELS, UNSEEN, 0.1)
        (folder / "metrics.json").write_text(json.dumps({"protocols": {protocol: metrics}}))
        np.savez(folder / "predictions.npz", scores=scores(skill), labels=LABELS, unseen=UNSEEN)
        for name in ("metrics.json", "predictions.npz"):
            evaluation.log_artifact(folder / name)
    return train.run_id


def aliases(store: str, name: str) -> dict[str, str]:
    return {alias: str(n) for alias, n in MlflowClient(store).get_registered_model(name).aliases.items()}


def test_only_a_model_that_is_better_beyond_its_interval_becomes_champion(store: str, tmp_path: Path) -> None:
    name = "svip-contest"
    first, close, best, worse = (trained(store, tmp_path, skill) for skill in (1.5, 1.55, 2.5, 1.0))

    begun = steps.register(first, name)
    assert (begun.version, begun.alias, begun.difference) == ("1", "champion", None)

    tie = steps.register(close, name)
    assert (tie.version, tie.alias, tie.champion) == ("2", "challenger", "1")
    assert tie.difference and tie.difference.low <= 0 < tie.difference.value
    assert aliases(store, name) == {"champion": "1", "challenger": "2"}

    won = steps.register(best, name)
    assert (won.version, won.alias, won.reason) == ("3", "champion", "better beyond the interval of the difference")
    assert won.difference and won.difference.low > 0
    assert won.champion_h == begun.h, "the same seed, the same interval"
    assert won.difference.value == pytest.approx(won.h.value - begun.h.value)
    assert aliases(store, name) == {"champion": "3", "challenger": "2"}

    lost = steps.register(worse, name)
    assert lost.alias == "challenger" and lost.difference and lost.difference.high < 0
    assert aliases(store, name) == {"champion": "3", "challenger": "4"}

    again = steps.register(close, name)
    assert (again.version, again.alias) == ("2", "challenger"), "no second version of the same training"
    assert steps.register(best, name).reason == "it is the champion already"
    version = MlflowClient(store).get_model_version(name, "3")
    assert version.tags["H"] == f"{won.h.value:.2f}" and version.tags["protocol"] == "validation"
    assert str(version.description).startswith("champion: better beyond") and version.run_id == best


def test_who_becomes_champion_during_a_comparison_is_the_one_to_beat(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "svip-at-once"
    first, best, good = (trained(store, tmp_path, skill) for skill in (1.0, 2.5, 2.0))
    steps.register(first, name)
    compare = registry.bootstrap_h

    def slow(answers: Answers, other: Answers | None = None) -> Interval:
        if other is not None:  # the champion's: meanwhile another process registers a better model
            monkeypatch.setattr(registry, "bootstrap_h", compare)
            steps.register(best, name)
        return compare(answers, other)

    monkeypatch.setattr(registry, "bootstrap_h", slow)
    lost = steps.register(good, name)
    champion = aliases(store, name)["champion"]
    assert (lost.alias, lost.champion) == ("challenger", champion) and lost.version != champion
    assert MlflowClient(store).get_model_version(name, champion).run_id == best
    version = MlflowClient(store).get_model_version(name, lost.version)
    assert str(version.description).startswith("challenger: not better")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"bundle": "c" * 64}, "tested on bundle cccccccccccc, the champion on bbbbbbbbbbbb: .* --name"),
        ({"protocol": "none"}, "tested by protocol none, the champion by validation"),
    ],
)
def test_what_was_tested_otherwise_is_not_compared(
    store: str, tmp_path: Path, other: dict[str, str], reason: str
) -> None:
    name = f"svip-other-{next(iter(other))}"
    steps.register(trained(store, tmp_path, 1.0), name)
    done = steps.register(trained(store, tmp_path, 3.0, **other), name)  # type: ignore[arg-type]
    assert (done.alias, done.difference) == ("challenger", None)
    assert re.search(reason, done.reason)


def test_what_can_not_be_registered_is_said(store: str, tmp_path: Path) -> None:
    with tracking.open_tracker("svip/registry", "train", tags={"step": "train"}) as untested:
        pass
    with pytest.raises(RegisterError, match="has no finished evaluation; make one with `svip evaluate`"):
        steps.register(untested.run_id)
    with pytest.raises(RegisterError, match="logged no model; name the folder of its checkpoint instead"):
        steps.register(trained(store, tmp_path, 1.0, model_status=None), "svip-modelless")
    with pytest.raises(RegisterError, match="has a model that is not whole in MLflow .PENDING.; name the folder"):
        steps.register(trained(store, tmp_path, 1.0, model_status=LoggedModelStatus.PENDING), "svip-modelless")
    assert not MlflowClient(store).search_registered_models("name = 'svip-modelless'")
    MlflowClient(store).create_registered_model("svip-by-hand")
    by_hand = MlflowClient(store).create_model_version("svip-by-hand", str(tmp_path))
    MlflowClient(store).set_registered_model_alias("svip-by-hand", "champion", by_hand.version)
    with pytest.raises(RegisterError, match="svip-by-hand version 1, does not say which run tested it.*--name"):
        steps.register(trained(store, tmp_path, 1.0), "svip-by-hand")
    with pytest.raises(RegisterError, match="does not say which run trained it"):
        steps.register(str(tmp_path))
