"""The MLflow run that frames a pipeline, and what the runs of all steps are called."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svip import tracking
from svip.changes import changes, changes_text, with_changes
from svip.config import Config, flatten, load_config, presets, variant

MADE_OF = "made_of.json"
"""File of a checkpoint's folder that holds ``made_of``."""

KFP_RUN_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""How a Kubeflow Pipelines server names a run; on one machine a pipeline's job has a plain number."""


def open_run(pipeline: str, preset: str, overrides: Sequence[str] = (), continues: str = "") -> str:
    """Check the configuration, start the MLflow run that all steps belong to, and return its id.

    ``continues``: pipelines (with blanks between) of which the first that got as far as having a run has it opened
    again instead.
    """
    config = load_config(preset, overrides)
    job = re.search(rf"-({KFP_RUN_ID})$", pipeline)
    changed = made_of(config, preset)["changes"]
    # without the job's id, and of a preset that is a file its name alone
    name = with_changes(f"{pipeline.partition('-')[0]} {preset if preset in presets() else Path(preset).stem}", changed)
    tags = {"preset": preset, "changes": changes_text(changed), tracking.KFP_RUN_TAG: job[1] if job else ""}
    return tracking.open_run(pipeline, experiment_of(config), flatten(config), tags, name, continues)


def data_settings(preset: str, overrides: Sequence[str] = ()) -> list[str]:
    """All of ``data.*`` and ``semantics.*`` as overrides: on nothing else do the bundle and the vectors depend."""
    values = flatten(load_config(preset, overrides))
    return [f"{key}={json.dumps(values[key])}" for key in values if key.startswith(("data.", "semantics."))]


def close_run(run_id: str, status: str) -> None:
    """End the parent run: FINISHED, FAILED or KILLED. With SVIP_NODES above 1 also the TrainJobs that it left.

    A pod of `train` that is lost leaves its job to the one that comes next, and only here is it known that none does:
    jobs end also where MLflow says no.
    """
    try:
        tracking.close_run(run_id, status)
    finally:
        job = re.search(rf"-({KFP_RUN_ID})$", run_id)
        if job and int(os.environ.get("SVIP_NODES") or 1) > 1:
            from svip import trainjob  # needs the extra `cluster`

            trainjob.end(job[1])


@contextmanager
def run_of_folder(
    folder: Path, experiment: str, name: str, parent_run_id: str, tags: Mapping[str, str]
) -> Iterator[tracking.Tracker]:
    """The run of what is done in a folder: when it goes on, the same one is opened again (its file ``run_id``).

    So it is the same parent to the trainings in it, which by that find again what they keep below SVIP_WORK.
    """
    record = folder / "run_id"
    known = record.read_text().strip() if record.exists() else None
    with tracking.open_tracker(
        experiment, name, parent_run_id=parent_run_id or None, run_id=known, tags=tags
    ) as tracker:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(tracker.run_id)
        yield tracker


def named(config: Config, run: str, made: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what is trained (the ablation's own name for it where there is one), and of which preset."""
    tags = {"variant": run.partition(":")[0] or variant(config), "seed": str(config.train.seed)}
    return {**tags, "preset": made["preset"], "changes": changes_text(made["changes"])}


def made_of(config: Config, preset: str, run: str = "") -> dict[str, Any]:
    """``preset``, and ``changes``: what ``config`` has otherwise than the preset (or a ``run`` of its ablation)."""
    own: list[str] = []
    if run:
        from svip import sweep  # imports PyTorch, which open_run can do without

        own = sweep.ablation_run(run).overrides
    return {"preset": preset, "changes": changes(config, load_config(preset, own, check=False))}


def made_of_checkpoint(checkpoint: Path, config: Config, trained: Config) -> dict[str, Any]:
    """The same of a checkpoint that is evaluated with ``config``; older ones don't say their preset."""
    record = checkpoint / MADE_OF
    made: dict[str, Any] = {"preset": "", "changes": {}}
    if record.exists():
        made = json.loads(record.read_text(encoding="utf-8"))
    return {**made, "changes": {**made["changes"], **changes(config, trained)}}


def experiment_of(config: Config) -> str:
    return f"svip/{config.data.dataset}"
