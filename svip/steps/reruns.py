"""Do a tracked run again, and say whether it comes to the same numbers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from svip import tracking
from svip.config import ConfigError, flatten, from_yaml, load_config
from svip.data.bundle_cache import open_bundle
from svip.data.errors import DataError
from svip.evaluation.metrics import ACCURACIES
from svip.semantics.vectors import read_embedding, vectors_sha256
from svip.steps.model import evaluate
from svip.steps.runs import run_of_folder
from svip.steps.training import train
from svip.training.checkpoint import write_json
from svip.training.launch import asked

log = logging.getLogger(__name__)

RESULT = "rerun.json"


class RerunError(ValueError):
    """A run that can't be done again, or not here; the message says what is missing."""


@dataclass(frozen=True)
class Agreement:
    """One number of a run, and what the rerun made of it."""

    name: str
    recorded: float | None
    """At the last step, as is ``rerun``."""
    rerun: float | None
    verdict: str
    """exact (at every step), within (the tolerance, at the last step), differs, or missing (in one of the two)."""

    @property
    def agrees(self) -> bool:
        return self.verdict in ("exact", "within")


def rerun(
    run_id: str, out: str, bundle: str = "", vectors: str = "", tolerance: float = 0.5, dry_run: bool = False
) -> dict[str, Any]:
    """Train as the run did, and evaluate where it did, into ``out``; what came out, as rerun.json has it.

    ``run_id``: of a training, of an evaluation, or of a pipeline's run. ``bundle`` and ``vectors``: where its data is
    now, if not where it was (the vectors are kept in MLflow too); it has to be the same. ``tolerance``: in points for
    accuracies, in percent for all else. ``dry_run``: train nothing, only list the lineage and what is different here.
    Called again it goes on. Raises RerunError.
    """
    trained, evaluated = tracking.find_runs(run_id)
    folder = Path(out)
    if (folder / RESULT).exists() and not dry_run:
        raise RerunError(f"{folder} holds a finished rerun ({RESULT}); give another --out")
    lineage = trained.lineage()
    result: dict[str, Any] = {"run_id": run_id, "lineage": lineage, "differences": differences(lineage)}
    if dry_run:
        return result
    config_file = _config_of(trained, folder)
    data = _find_bundle(trained, bundle)
    words = _find_vectors(trained, vectors, folder)
    preset, overrides = _as_overrides(trained.tags.get("preset", ""), config_file)
    for what, then, now in result["differences"]:
        log.warning("%s: was %s, now %s", what, then or "none", now or "none")
    checkpoint = str(folder / "checkpoint")
    tags = {"step": "rerun", "rerun_of": run_id, "bundle_sha256": trained.tags.get("bundle_sha256", "")}
    with (
        tracking.runs_of_their_own(),
        run_of_folder(folder, trained.experiment, f"rerun-{trained.name}", "", tags) as tracker,
    ):
        parent = tracker.run_id
        arguments = (data, words, checkpoint, preset, overrides, parent)
        again = train(*arguments, log_model=False, processes=_processes(lineage))["run_id"]
        compared = agreements(trained.histories(), tracking.find_runs(again)[0].histories(), tolerance)
        if evaluated:
            tested_with = from_yaml(_config_of(evaluated, folder / "evaluated")).evaluation
            settings = [f"evaluation.{key}={json.dumps(value)}" for key, value in vars(tested_with).items()]
            evaluate(checkpoint, data, str(folder / "evaluation"), parent, overrides=settings)
            new = tracking.find_evaluation(again)
            compared += agreements(evaluated.histories(), new.histories() if new else {}, tolerance)
        result |= {
            "rerun_id": parent,
            "tolerance": tolerance,
            "metrics": [asdict(line) for line in compared],
            "agrees": bool(compared) and all(line.agrees for line in compared),
        }
        write_json(folder / RESULT, result)
        tracker.log_artifact(folder / RESULT)
        tracker.set_tags({"agrees": str(result["agrees"]).lower()})
    return result


def agreements(
    recorded: Mapping[str, tracking.History], rerun: Mapping[str, tracking.History], tolerance: float
) -> list[Agreement]:
    """Number by number; ``tolerance`` in points for accuracies, in percent for all else."""
    lines = []
    for name in sorted(recorded.keys() | rerun.keys()):
        before, after = recorded.get(name, {}), rerun.get(name, {})
        a, b = (history[max(history)] if history else None for history in (before, after))
        if before == after:
            verdict = "exact"
        elif a is None or b is None or max(before) != max(after):
            verdict = "missing"
        else:
            scale = 1 if name.rpartition("/")[2] in ACCURACIES else abs(a) / 100
            verdict = "within" if abs(a - b) <= tolerance * scale else "differs"
        lines.append(Agreement(name, a, b, verdict))
    return lines


def differences(lineage: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(what, then, now) for all of a run's code and environment that is another here."""
    diff = tracking.code_diff()
    nodes = asked("SVIP_NODES") or 1
    now = {
        "git_sha": tracking.git_sha(),
        "code_diff_sha256": diff.sha256 if diff else "",
        "image_digest": os.environ.get("SVIP_IMAGE_DIGEST", ""),
        **tracking.environment(lineage.get("device", "")),
        "processes": str(_processes(lineage) * nodes or 1),
    }
    keys = [key for key in (*now, *lineage) if key in now or key.startswith("package ")]
    return [
        (key, lineage.get(key, ""), now.get(key, ""))
        for key in dict.fromkeys(keys)
        if lineage.get(key, "") != now.get(key, "")
    ]


def _processes(lineage: Mapping[str, str]) -> int:
    """How many train on a machine to be as many as then, if it has the GPUs; 0 where a run doesn't say."""
    then = int(lineage.get("processes") or 0) // (asked("SVIP_NODES") or 1)
    return then if lineage.get("device") == "cpu" else min(then, torch.cuda.device_count())


def _find_bundle(run: tracking.Recorded, given: str) -> str:
    """The address of the bundle that the run used; RerunError where it isn't there, or another one is."""
    address, expected = given or run.tags.get("bundle", ""), run.tags.get("bundle_sha256", "")
    if not address:
        raise RerunError(f"run {run.run_id} does not say where its bundle was; give it with --bundle")
    try:
        found = open_bundle(address).sha256
    except DataError as error:
        raise RerunError(
            f"run {run.run_id} needs bundle {expected[:12]}, and {error}; say where it is with --bundle"
        ) from error
    if found != expected:
        raise RerunError(
            f"run {run.run_id} needs bundle {expected[:12]}, and {address} is {found[:12]}; give the same data "
            "with --bundle"
        )
    return address


def _find_vectors(run: tracking.Recorded, given: str, folder: Path) -> str:
    """The folder of the word vectors that the run used, as given or from MLflow."""
    found = Path(given) if given else run.download(tracking.VECTORS, folder)
    if found is None:
        raise RerunError(f"run {run.run_id} did not keep its word vectors; give the same ones with --vectors")
    digest, expected = vectors_sha256(read_embedding(found).vectors), run.tags.get("vectors_sha256")
    if expected and digest != expected:
        raise RerunError(
            f"run {run.run_id} needs word vectors {expected[:12]}, and {found} holds {digest[:12]}; give the same "
            "ones with --vectors"
        )
    return str(found)


def _as_overrides(preset: str, config: Path) -> tuple[str, list[str]]:
    """The run's own preset and what it changed of it, which names the new runs alike; else the whole as a preset."""
    try:
        usual, wanted = flatten(load_config(preset)), flatten(from_yaml(config))
        overrides = [f"{key}={json.dumps(value)}" for key, value in wanted.items() if value != usual[key]]
        if flatten(load_config(preset, overrides)) == wanted:
            return preset, overrides
    except ConfigError:
        log.debug("preset %s is not here", preset)
    return str(config), []


def _config_of(run: tracking.Recorded, folder: Path) -> Path:
    path = run.download(tracking.CONFIG, folder)
    if path is None:
        raise RerunError(f"run {run.run_id} has no {tracking.CONFIG}: its configuration was not recorded")
    return path
