"""The step that makes a model: in this process, in several of this machine, or on several nodes of a cluster."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svip import sweep, tracking
from svip.changes import run_name
from svip.config import Config, flatten, load_config
from svip.data import s3
from svip.evaluation.charts import training_charts
from svip.models.weights import stored_names
from svip.steps.inputs import open_inputs
from svip.steps.provenance import lineage_tags, record_lineage
from svip.steps.runs import MADE_OF, experiment_of, made_of, named
from svip.training import distributed
from svip.training.checkpoint import CheckpointError, can_go_on, goes_on, read_info, write_json
from svip.training.launch import asked, launch, processes_for
from svip.training.loop import check_resumable
from svip.training.loop import train as train_model
from svip.training.work import Place, workplace

log = logging.getLogger(__name__)


def train(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
    resume: bool = True,
    run: str = "",
    log_model: bool = True,
    processes: int = 0,
    nodes: int = 0,
) -> dict[str, Any]:
    """Train into ``out``, going on from what is there (``resume`` False: refuse to).

    ``out``, ``bundle`` and ``vectors`` are folders or s3:// addresses. ``run``: a run of the ablation, such as
    ``no_psc:1``, whose overrides come last. ``log_model``: store the trained model in MLflow too. The run id, and T1,
    U, S, H on the validation classes where they were used.

    ``processes``: how many train together on a machine (0: SVIP_PROCESSES, else one for each GPU). ``nodes``: how many
    machines of a cluster (0: SVIP_NODES, else this one); more than one are a TrainJob of Kubeflow. Under torchrun, this
    process joins the others. With SVIP_WORK, a folder or s3:// address, all that a training needs to go on is kept
    there until it has finished, so that another pod with an empty ``out`` goes on with it; with SVIP_WORK_KEEP=1 the
    finished training stays there too, for a caller that removes it once all is done.
    """
    config = load_config(preset, [*overrides, *(sweep.ablation_run(run).overrides if run else [])])
    if distributed.started_by_torchrun():
        nodes = processes = 1
    else:
        nodes, processes = asked("SVIP_NODES", nodes) or 1, processes_for(config.train.device, processes)
    with distributed.joined():
        address = distributed.on_main(lambda: _address(config, out, parent_run_id, run, resume))
        place = Place(address)
        if address != out:
            log.info("training is kept at %s until it has finished", place.address)
        if (nodes > 1 or processes > 1) and not place.finished():
            options = {"--preset": preset, "--parent-run-id": parent_run_id, "--run": run}
            rest = [f"{name}={value}" for name, value in options.items() if value]
            rest += [*([] if log_model else ["--no-log-model"]), "--", *overrides]
            if nodes > 1:
                from svip import trainjob  # needs the extra `cluster`

                trainjob.run(trainjob.Training(bundle, vectors, place.address, rest, config), nodes, processes)
            else:
                files = [f"--bundle={bundle}", f"--vectors={vectors}", f"--out={place.address}"]
                with _saying_what_is_kept(place, config):
                    # where training is kept is what --out says by now
                    launch(["train", *files, *rest], processes, {"SVIP_WORK": ""})
        else:
            with _saying_what_is_kept(place, config):
                _train(config, bundle, vectors, place, preset, parent_run_id, run, log_model)
        return distributed.on_main(lambda: _result(place, out, elsewhere=address != out))


@contextmanager
def _saying_what_is_kept(place: Place, config: Config) -> Iterator[None]:
    """Within it a training that is stopped says how the same command would go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if distributed.speaks():
            if can_go_on(place.folder):
                log.warning("stopped; the same command goes on %s", goes_on(place.folder))
            else:
                hint = "" if config.train.checkpoint_steps else " (train.checkpoint_steps=10 keeps more)"
                log.warning("stopped before the first checkpoint; the same command begins anew%s", hint)
        raise


def _address(config: Config, out: str, parent_run_id: str, run: str, resume: bool) -> str:
    """Where this training is kept: ``out``, or below SVIP_WORK where nothing was begun in ``out``.

    What is below SVIP_WORK counts until all of it is in ``out``, which may hold a part of it.
    """
    work = os.environ.get("SVIP_WORK")
    address = out
    if work and not out.startswith("s3://") and not Place(out).finished():
        kept = workplace(work, out, parent_run_id, run, config)
        address = kept if _begun(kept) or not _begun(out) else out
    if not resume and _begun(address):
        raise FileExistsError(f"{address} is not empty; resume it (--resume), or train into another --out")
    return address


def _begun(address: str) -> bool:
    if address.startswith("s3://"):
        return bool(s3.names(address))
    return Path(address).exists() and any(Path(address).iterdir())


def _result(place: Place, out: str, elsewhere: bool) -> dict[str, Any]:
    if elsewhere:
        place.hand_over(Path(out), keep=os.environ.get("SVIP_WORK_KEEP") == "1")
        place = Place(out)
    validation = json.loads(place.read("model.json"))["validation"] or {}
    run_id = place.read("run_id").strip()
    if place.remote:
        place.forget()
    return {"run_id": run_id, **{f"val/{name}": value for name, value in validation.items()}}


def _train(
    config: Config,
    bundle: str,
    vectors: str,
    place: Place,
    preset: str,
    parent_run_id: str,
    run: str,
    log_model: bool,
) -> None:
    """Train in this process, which may be one of several: rank 0 is the one that tracks, and that writes."""
    data, embedding = open_inputs(config, preset, bundle, vectors)
    directory = place.folder
    record = directory / "run_id"

    def fetched() -> str | None:
        place.fetch()
        if not (directory / "model.json").is_file():
            stored_names(config.model.weights)
        elif "imported" in read_info(directory):
            raise CheckpointError(f"{directory} holds an imported checkpoint; train into another --out")
        same = check_resumable(config, data, embedding.vectors, directory)
        return record.read_text().strip() if same and record.exists() else None

    made = made_of(config, preset, run)
    tags = {"step": "train", **lineage_tags(config, data, bundle), **named(config, run, made)}
    with tracking.open_tracker(
        experiment_of(config),
        run_name("train", config, made["changes"], run),
        parent_run_id=parent_run_id or None,
        run_id=distributed.on_main(fetched),
        tags=tags,
        enabled=distributed.is_main(),
    ) as tracker:

        def begin() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            record.write_text(tracker.run_id)
            write_json(directory / MADE_OF, made)
            tracker.log_params(flatten(config))
            record_lineage(tracker, config, data, bundle, embedding, vectors)

        def report_epoch(metrics: Mapping[str, float], epoch: int, phase: str, ended: int) -> None:
            # both phases have an epoch 1: the final one's losses get a name of their own
            own = "final_train/" if phase == "final" else "train/"
            tracker.log_metrics({name.replace("train/", own): value for name, value in metrics.items()}, epoch, ended)

        def finish() -> None:
            logged = directory / "logged_run_id"  # a rerun adds no second model to the run
            if not logged.exists() or logged.read_text() != tracker.run_id:
                for name in ("config.yaml", "model.json", "history.json"):
                    tracker.log_artifact(directory / name)
                tracker.log_artifact(training_charts(directory), "charts")
                if log_model:
                    log.info("model in MLflow: %s", tracking.log_checkpoint_model(tracker, directory) or "none")
                logged.write_text(tracker.run_id)
            record.write_text(tracker.run_id)  # the real one, where the server was away when the training began
            place.save(finished=True)

        with distributed.naming_the_failure():
            distributed.on_main(begin)
            with tracking.system_metrics(tracker):
                train_model(config, data, embedding.vectors, directory, report_epoch, place.save)
            distributed.on_main(finish)
