"""Steps that tune: a whole study on this machine, or its parts, for workers on many."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svip import tracking
from svip.changes import NOT_OF_TRAINING
from svip.config import Config, flatten, load_config, to_yaml
from svip.semantics.vectors import vectors_sha256
from svip.steps.inputs import open_inputs
from svip.steps.runs import experiment_of
from svip.training import distributed
from svip.training.launch import launch, processes_for
from svip.tuning.dashboard import show_dashboard
from svip.tuning.launch import run_workers
from svip.tuning.objective import check_objective
from svip.tuning.report import best_trial, write_report
from svip.tuning.space import Parameter, Space, assignments, load_space, own_values, shown
from svip.tuning.storage import STORAGE, TuningError, storage_address
from svip.tuning.study import PRUNERS, SAMPLERS, Settings, Study, create_study, open_study
from svip.tuning.worker import Worker

log = logging.getLogger(__name__)


def tune(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    space: str = "",
    trials: int = 20,
    workers: int = 1,
    storage: str = "",
    sampler: str = "tpe",
    pruner: str = "median",
    seed: int = 0,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
    name: str = "",
    max_errors: int = 10,
    heartbeat: int = 15,
    processes: int = 0,
) -> dict[str, Any]:
    """Tune on the validation classes with so many worker processes; what is in ``out`` goes on, or is finished.

    ``storage``: a database's URL (else SVIP_TUNING_STORAGE, else ``out``/study.journal). ``name``: of the study.
    ``processes``: how many train one trial together (0: one for each of the worker's GPUs).
    Returns ``trial``, ``H``, ``overrides`` (the best values), these ``shown`` in short, and ``page``. Raises
    SpaceError, TuningError, ConfigError.
    """
    directory, address = Path(out), storage_address(storage, Path(out))
    config, study = _plan(
        *(bundle, vectors, directory, preset, space, trials, address, sampler, pruner, seed, overrides, name, heartbeat)
    )
    if not study.is_finished():
        with tracking.open_tracker(
            experiment_of(config),
            f"tune-{preset}",
            parent_run_id=parent_run_id or None,
            run_id=study.run_id or None,
            tags={"preset": preset, "step": "tune", "study": study.name},
        ) as tracker:
            study.set_run_id(tracker.run_id)
            tracker.log_params(flatten(config))
            try:
                arguments = ["--bundle", bundle, "--vectors", vectors, "--out", out, f"--max-errors={max_errors}"]
                arguments.append(f"--processes={processes}")
                run_workers(study, arguments, workers, address, directory / "workers")
            except KeyboardInterrupt:
                log.info("stopped: %d of %d trials are done; the same command goes on", len(study.ended_well()), trials)
                raise
            finally:
                metrics, files, tags = _report(study, directory, directory)
                tracker.log_metrics(metrics)
                tracker.set_tags(tags)
                for file in files:
                    tracker.log_artifact(file)
    return _result(study, directory)


def plan_tuning(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    space: str = "",
    trials: int = 20,
    workers: int = 2,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
    name: str = "",
    heartbeat: int = 15,
) -> list[str]:
    """Start a study for workers elsewhere, whose trials are children of ``parent_run_id``; the workers' names.

    Where SVIP_WORK is a folder, what all workers share lies there, not in ``out``.
    """
    name = name or (f"tuning-{parent_run_id[:12]}" if parent_run_id else "")
    address = storage_address("", _shared(name, Path(out)))
    if "://" not in address and "KUBERNETES_SERVICE_HOST" in os.environ:
        raise TuningError(
            "workers in other pods need a database: set SVIP_TUNING_STORAGE to its postgresql:// address (on a cluster "
            "it is in the Secret svip-tuning)"
        )
    if "://" in os.environ.get("SVIP_WORK", ""):
        log.warning(
            "SVIP_WORK=%s is no folder, and tuning keeps checkpoints in none else: a lost worker's trial begins anew",
            os.environ["SVIP_WORK"],
        )
    options: dict[str, Any] = {"overrides": overrides, "name": name, "heartbeat": heartbeat}
    _, study = _plan(bundle, vectors, Path(out), preset, space, trials, address, shared=True, **options)
    study.set_run_id(parent_run_id)
    return [f"worker-{number}" for number in range(min(workers, trials))]


def tune_worker(
    bundle: str, vectors: str, study: str, max_errors: int = 10, processes: int = 0, storage: str = ""
) -> int:
    """Work at the study of that folder until it is finished; the number of trials that ended well meanwhile.

    ``processes``: how many train a trial together (0: SVIP_PROCESSES, else one for each GPU). Under torchrun this
    process joins the others.
    """
    folder = Path(study)
    config = load_config(str(folder / "config.yaml"))
    processes = 1 if distributed.started_by_torchrun() else processes_for(config.train.device, processes)
    if processes == 1:
        with distributed.joined():
            return _work(bundle, vectors, folder, config, max_errors, storage)
    opened, work = _open(folder, storage)
    before = len(opened.ended_well())
    files = [f"--bundle={bundle}", f"--vectors={vectors}", f"--out={study}", f"--max-errors={max_errors}"]
    launch(["tune", "--worker", *files], processes, {STORAGE: storage_address(storage, work)})  # it may hold a password
    return len(opened.ended_well()) - before


def _work(bundle: str, vectors: str, folder: Path, config: Config, max_errors: int, storage: str) -> int:
    record, space = _read(folder)
    data, embedding = open_inputs(config, record["preset"], bundle, vectors)
    opened, work = _open(folder, storage)
    now = {"bundle_sha256": data.sha256, "words_sha256": vectors_sha256(embedding.vectors)}
    if now != {key: getattr(opened.settings, key) for key in now}:
        raise TuningError(f"study {opened.name} was begun with another bundle or other word vectors than these")
    base, trials = folder / "config.yaml", work / "trials"
    arguments = (opened, space, record["preset"], base, data, embedding.vectors, trials, experiment_of(config))
    return Worker(*arguments, max_errors).work()


def tuning_report(study: str, out: str, parent_run_id: str = "") -> dict[str, Any]:
    """Write what a study has found to ``out``, and to its MLflow run; the result as of ``tune``."""
    opened, _ = _open(Path(study))
    if not opened.is_finished():
        raise TuningError(
            f"study {opened.name}: {len(opened.ended_well())} of {opened.trials} trials have ended; run more workers"
        )
    told = _report(opened, Path(study), Path(out))
    result = _result(opened, Path(out))
    if parent_run_id:
        tracking.log_to_run(parent_run_id, *told)
    return result


def tuning_dashboard(study: str, storage: str, port: int) -> None:
    """Serve optuna-dashboard for the study of that folder on this machine, until it is interrupted."""
    opened, _ = _open(Path(study), storage)
    show_dashboard(opened, port)


def _plan(
    bundle: str,
    vectors: str,
    out: Path,
    preset: str,
    space: str,
    trials: int,
    address: str,
    sampler: str = "tpe",
    pruner: str = "median",
    seed: int = 0,
    overrides: Sequence[str] = (),
    name: str = "",
    heartbeat: int = 15,
    shared: bool = False,
) -> tuple[Config, Study]:
    """Check everything, then make the study, or go on with that of ``out``, and have its trials wait."""
    for option, value, known in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS)):
        if value not in known:
            raise TuningError(f"unknown {option} {value!r}; there are: {', '.join(known)}")
    if trials < 1:
        raise TuningError(f"trials={trials}: expected at least 1")
    config = load_config(preset, overrides)
    parameters = load_space(space, preset, overrides)
    data, embedding = open_inputs(config, preset, bundle, vectors)
    check_objective(config, data)
    settings = Settings(
        preset=preset,
        config={key: value for key, value in flatten(config).items() if not key.startswith(NOT_OF_TRAINING)},
        space=_plain([vars(parameter) for parameter in parameters]),
        bundle_sha256=data.sha256,
        words_sha256=vectors_sha256(embedding.vectors),
        sampler=sampler,
        pruner=pruner,
        seed=seed,
    )
    kept = tracking.without_password(address) if "://" in address else "study.journal"
    record: dict[str, Any] = {
        "name": name or f"{config.data.dataset}-{secrets.token_hex(4)}",
        "storage": kept,
        "shared": shared,
    }
    record |= {"preset": preset, "heartbeat": heartbeat, "space": settings.space}
    out.mkdir(parents=True, exist_ok=True)
    begun = _begin(out / "study.json", record)
    if not begun:
        before, _ = _read(out)
        if name and name != before["name"]:
            raise TuningError(f"{out} holds study {before['name']}, not {name}; use another --out")
        if before["storage"] != kept:
            raise TuningError(f"study {before['name']} of {out} is kept in {before['storage']}; give that as --storage")
        record["name"] = before["name"]
    home = _shared(record["name"], out) if shared else out
    try:
        study = create_study(record["name"], address, home, settings, trials, heartbeat)
    except BaseException:
        if begun:
            (out / "study.json").unlink()
        raise
    _replace(out / "config.yaml", to_yaml(config))
    _replace(out / "study.json", json.dumps(record, indent=2) + "\n")
    first = own_values(parameters, config)
    if first is None:
        log.info("the preset's own values lie outside of the search space, so no trial tries them")
    study.fill(first)
    return config, study


def _begin(path: Path, record: dict[str, Any]) -> bool:
    """Write study.json; False where there is one, be it of another machine that begins at the same time."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.link(part, path)  # whole or not at all, and never over another
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def _replace(path: Path, text: str) -> None:
    """Write a file whole, under a temporary name of its own: another machine may be doing the same."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _open(folder: Path, storage: str = "") -> tuple[Study, Path]:
    """The study that study.json of that folder names, and the folder that its workers share."""
    record, _ = _read(folder)
    work = _shared(record["name"], folder) if record["shared"] else folder
    return open_study(record["name"], storage_address(storage, work), work, record["heartbeat"]), work


def _shared(name: str, folder: Path) -> Path:
    """The study's place in SVIP_WORK, where that is a folder; else ``folder``."""
    work = os.environ.get("SVIP_WORK", "")
    return Path(work) / "tuning" / name if name and work and "://" not in work else folder


def _read(folder: Path) -> tuple[dict[str, Any], Space]:
    """study.json's content, and its search space."""
    if not (folder / "study.json").is_file():
        raise TuningError(f"{folder} holds no study (no study.json); start one with `svip tune --out`")
    record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    rows = [
        row | {"choices": tuple(row["choices"]), "when": {key: tuple(values) for key, values in row["when"].items()}}
        for row in record["space"]
    ]
    return record, tuple(Parameter(**row) for row in rows)


def _report(study: Study, folder: Path, out: Path) -> tuple[dict[str, float], list[Path], dict[str, str]]:
    """Write what the study has found so far; the metrics, files and tags that its MLflow run gets."""
    record, space = _read(folder)
    files = write_report(study, space, record["preset"], folder / "config.yaml", out)
    best = best_trial(study)
    if best is None:
        return {}, files, {}
    tags = {"best.trial": str(best.number), "best.overrides": " ".join(assignments(best.params))}
    return {"best/val/H": float(best.value or 0)}, files, tags


def _result(study: Study, out: Path) -> dict[str, Any]:
    best = best_trial(study)
    if best is None:
        raise TuningError(f"study {study.name}: all trials were pruned, none finished; use another --pruner")
    return {
        "trial": best.number,
        "H": float(best.value or 0),
        "overrides": assignments(best.params),
        "shown": shown(best.params),
        "page": str(out / "tuning.html"),
    }


def _plain(content: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(content))
