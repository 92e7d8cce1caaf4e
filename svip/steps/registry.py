"""Register a trained model, and make it the champion where it is better than the one that is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from svip import tracking
from svip.config import from_yaml
from svip.evaluation.intervals import Answers, Interval, bootstrap_h


class RegisterError(ValueError):
    """A model that can't be registered; the message says what is missing."""


@dataclass(frozen=True)
class Tested:
    """What a comparison needs of a model's evaluation."""

    run_id: str
    bundle_sha256: str
    protocol: str
    answers: Answers


@dataclass(frozen=True)
class Registration:
    """What became of a model."""

    name: str
    version: str
    h: Interval
    alias: str
    """champion or challenger."""
    reason: str
    champion: str = ""
    """Version that was champion before, if there was another."""
    champion_h: Interval | None = None
    difference: Interval | None = None
    """H minus the champion's, with the interval of this difference; None where they can't be compared."""


def register(run: str, name: str = "") -> Registration:
    """Make a tested model the next version of a registered model, and its challenger or champion.

    ``run``: the id of a training, of an evaluation or of a pipeline's run, or the folder of a checkpoint. ``name``: of
    the registered model, else ``svip-`` and the data set.

    The first version becomes champion. A later one does where its honest H is better than the champion's beyond the
    95 % interval of their paired difference, on the same test images by the same protocol; else it is the challenger.
    Called again for the same training it decides anew. Raises RegisterError.
    """
    checkpoint = Path(run) if Path(run).is_dir() else None
    trained, evaluated = tracking.find_runs(_run_of(checkpoint) if checkpoint else run)
    evaluated = evaluated or tracking.find_evaluation(trained.run_id)
    if evaluated is None:
        raise RegisterError(f"run {trained.run_id} has no finished evaluation; make one with `svip evaluate`")
    with tempfile.TemporaryDirectory() as folder:
        config = trained.download(tracking.CONFIG, Path(folder))
        if config is None:
            raise RegisterError(f"run {trained.run_id} has no {tracking.CONFIG}: its configuration was not recorded")
        name = name or f"svip-{from_yaml(config).data.dataset}"
    challenger, version = _tested(evaluated), None
    h = bootstrap_h(challenger.answers)
    while True:
        champion = tracking.champion_of(name)
        if champion and champion.run_id == trained.run_id:
            return Registration(name, champion.number, h, tracking.CHAMPION, "it is the champion already")
        holder = _tested(tracking.read_run(_evaluation_of(champion))) if champion else None
        alias, reason, difference = _decide(challenger, holder)
        version = version or tracking.version_of(name, trained.run_id)
        version = version or tracking.register_version(name, _model_of(trained, checkpoint), trained.run_id)
        tags = {
            "H": f"{h.value:.2f}",
            "H_interval": f"{h.low:.2f} to {h.high:.2f}",
            "protocol": challenger.protocol,
            "bundle_sha256": challenger.bundle_sha256,
            tracking.EVALUATION_TAG: challenger.run_id,
        }
        against = f": {difference} points of H to version {champion.number}" if champion and difference else ""
        tracking.describe(version, tags, f"{alias}: {reason}{against}")
        if tracking.champion_of(name) == champion:  # else another has become it meanwhile: compare with that one
            break
    tracking.set_alias(version, alias)  # last, so that a champion always says which run tested it
    return Registration(
        name,
        version.number,
        h,
        alias,
        reason,
        champion.number if champion else "",
        bootstrap_h(holder.answers) if holder else None,
        difference,
    )


def _decide(challenger: Tested, holder: Tested | None) -> tuple[str, str, Interval | None]:
    """The alias that a version deserves beside the champion, why, and the difference in H."""
    if holder is None:
        return tracking.CHAMPION, "the first version", None
    if obstacle := _obstacle(challenger, holder):
        return tracking.CHALLENGER, obstacle, None
    difference = bootstrap_h(challenger.answers, holder.answers)
    if difference.low > 0:
        return tracking.CHAMPION, "better beyond the interval of the difference", difference
    return tracking.CHALLENGER, "not better beyond the interval of the difference", difference


def _run_of(checkpoint: Path) -> str:
    record = checkpoint / "run_id"
    if not record.is_file():
        raise RegisterError(
            f"{checkpoint} does not say which run trained it (no run_id); only what `svip train` made can"
        )
    return record.read_text().strip()


def _evaluation_of(version: tracking.Version) -> str:
    if tracking.EVALUATION_TAG not in version.tags:
        raise RegisterError(
            f"the champion, {version.name} version {version.number}, does not say which run tested it (tag "
            f"{tracking.EVALUATION_TAG}), so nothing can be compared with it; use another --name"
        )
    return version.tags[tracking.EVALUATION_TAG]


def _tested(evaluation: tracking.Recorded) -> Tested:
    with tempfile.TemporaryDirectory() as folder:
        for file in ("metrics.json", "predictions.npz"):
            if evaluation.download(file, Path(folder)) is None:
                raise RegisterError(f"run {evaluation.run_id} has no {file}; run `svip evaluate` again")
        answers = Answers.read(Path(folder))
    tags = evaluation.tags
    return Tested(evaluation.run_id, tags.get("bundle_sha256", ""), tags.get("protocol", ""), answers)


def _obstacle(challenger: Tested, holder: Tested) -> str:
    """Why two evaluations can't be compared; nothing where they can."""
    if challenger.bundle_sha256 != holder.bundle_sha256:
        return (
            f"tested on bundle {challenger.bundle_sha256[:12]}, the champion on {holder.bundle_sha256[:12]}: "
            "give the models of each a --name"
        )
    if challenger.protocol != holder.protocol:
        return f"tested by protocol {challenger.protocol}, the champion by {holder.protocol}"
    return ""


def _model_of(trained: tracking.Recorded, checkpoint: Path | None) -> str:
    """The id of the model that the training logged; where it logged none (in an ablation), of the checkpoint."""
    statuses = {model: tracking.model_status(model) for model in trained.models}
    ready = [model for model, status in statuses.items() if status == "READY"]
    if ready:
        return ready[-1]
    if checkpoint is None:
        said = "logged no model"
        if statuses:
            said = f"has a model that is not whole in MLflow ({', '.join(sorted(set(statuses.values())))})"
        raise RegisterError(f"run {trained.run_id} {said}; name the folder of its checkpoint instead")
    tags = {"step": "register"}
    with tracking.open_tracker(trained.experiment, "register", parent_run_id=trained.run_id, tags=tags) as tracker:
        model = tracking.log_checkpoint_model(tracker, checkpoint).removeprefix("models:/")
    if not model:
        raise RegisterError(f"the model of {checkpoint} could not be logged (see above); try again")
    return model
