"""Steps that make a model, and those that look at one: train, import, evaluate, report, figures, predict."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from svip import sweep, tracking
from svip.changes import run_name
from svip.config import flatten, load_config, variant
from svip.data.bundle_cache import open_bundle
from svip.evaluation.charts import training_charts
from svip.evaluation.evaluate import check_bundle
from svip.evaluation.evaluate import evaluate as evaluate_checkpoint
from svip.evaluation.evaluate import report as make_report
from svip.evaluation.gallery import draw_figures
from svip.evaluation.report import markdown_table
from svip.models.published import load_published
from svip.models.svip import SVIP
from svip.predict import Predictor, write_overlays
from svip.semantics.vectors import read_embedding, read_vectors
from svip.steps.runs import MADE_OF, experiment_of, made_of, made_of_checkpoint, named
from svip.training.checkpoint import CheckpointError, read_config, read_info, save_model, write_classes, write_json
from svip.training.loop import check_resumable
from svip.training.loop import train as train_model

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
) -> dict[str, Any]:
    """Train into ``out``, going on from what is there (``resume`` False: refuse to).

    ``run``: a run of the ablation, such as ``no_psc:1``, whose overrides come last. ``log_model``: store the trained
    model in MLflow too. The run id, and T1, U, S, H on the validation classes where they were used.
    """
    config = load_config(preset, [*overrides, *(sweep.ablation_run(run).overrides if run else [])])
    made = made_of(config, preset, run)
    data, embedding, directory = open_bundle(bundle), read_embedding(Path(vectors)), Path(out)
    made_with = {name: data.info[name] for name in ("dataset", "split", "fold")} | data.info.get("settings", {})
    for name in sorted(made_with.keys() - {"allow_missing"}):  # what is saved has to be what ran
        if getattr(config.data, name) != made_with[name]:
            raise ValueError(
                f"data.{name}={getattr(config.data, name)} (preset {preset}), but the bundle {bundle} has "
                f"{made_with[name]}; use the preset that it was made with, or override data.{name}={made_with[name]}"
            )
    if embedding.names != data.attribute_names:
        raise ValueError(f"{vectors} was made for other attributes than those of {bundle}; run embed-attributes again")
    if (directory / "model.json").is_file() and "imported" in read_info(directory):
        raise CheckpointError(f"{directory} holds an imported checkpoint; train into another --out")
    if not resume and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; resume it (--resume), or train into another --out")
    check_resumable(config, data, embedding.vectors, directory)  # before the run of what is there is reopened
    record = directory / "run_id"
    tags = {"bundle_sha256": data.sha256, "step": "train", **named(config, run, made)}
    with tracking.open_tracker(
        experiment_of(config),
        run_name("train", config, made["changes"], run),
        parent_run_id=parent_run_id or None,
        run_id=record.read_text().strip() if record.exists() else None,
        tags=tags,
    ) as tracker:
        directory.mkdir(parents=True, exist_ok=True)
        record.write_text(tracker.run_id)
        write_json(directory / MADE_OF, made)
        tracker.log_params(flatten(config))

        def report_epoch(metrics: Mapping[str, float], epoch: int, phase: str) -> None:
            # both phases have an epoch 1: the final one's losses get a name of their own
            own = "final_train/" if phase == "final" else "train/"
            tracker.log_metrics({name.replace("train/", own): value for name, value in metrics.items()}, epoch)

        info = train_model(config, data, embedding.vectors, directory, report_epoch)
        logged = directory / "logged_run_id"  # a rerun adds no second model to the run
        if not logged.exists() or logged.read_text() != tracker.run_id:
            for name in ("config.yaml", "model.json", "history.json"):
                tracker.log_artifact(directory / name)
            tracker.log_artifact(training_charts(directory), "charts")
            if log_model:
                log.info("model in MLflow: %s", tracking.log_checkpoint_model(tracker, directory) or "none")
            logged.write_text(tracker.run_id)
        validation = {f"val/{name}": value for name, value in (info["validation"] or {}).items()}
        return {"run_id": tracker.run_id, **validation}


def import_checkpoint(
    file: str, word_vectors: str, out: str, preset: str, overrides: Sequence[str] = (), bundle: str = ""
) -> dict[str, Any]:
    """Make a checkpoint at ``out`` of the authors' released file, running nothing of it; model.json's content.

    word_vectors: a .npy file or the folder of embed_attributes. With a ``bundle`` it can be tested on that one only.
    """
    config, directory = load_config(preset, overrides), Path(out).resolve()
    config.train.select = False  # nothing was chosen on validation classes
    if directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise FileExistsError(f"{out} is not empty; import into another --out")
    words = read_vectors(word_vectors)
    model = SVIP(dataclasses.replace(config.model, weights="none"), config.data.image_size, torch.from_numpy(words))
    info: dict[str, Any] = dict.fromkeys(("epochs", "gamma", "validation", "bundle_sha256", "device", "seconds"))
    info["attributes"] = len(words)
    data = open_bundle(bundle) if bundle else None
    if data:
        check_bundle(Path(file), config, info, data)
        info["bundle_sha256"] = data.sha256
    left_over = load_published(model, Path(file))
    with Path(file).open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    info["imported"] = {"file": Path(file).name, "sha256": digest, "left_over": left_over}
    temporary = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of an import that was killed
    temporary.mkdir(parents=True)
    try:
        write_json(temporary / "history.json", [])
        write_json(temporary / MADE_OF, made_of(config, preset))
        if data:
            write_classes(temporary, data.classes)
        save_model(temporary, model, config, info)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def evaluate(
    checkpoint: str, bundle: str, out: str, parent_run_id: str = "", run: str = "", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluate a checkpoint on the test images by every protocol of its configuration; metrics.json's content.

    ``overrides`` may change what is evaluated (``evaluation.*``) and where. The parent run gets the numbers too, unless
    this is one of many (``run``, as in ``train``).
    """
    data = open_bundle(bundle)
    config = read_config(Path(checkpoint), overrides)
    made = made_of_checkpoint(Path(checkpoint), config, read_config(Path(checkpoint)))
    tags = {"bundle_sha256": data.sha256, "step": "evaluate", **named(config, run, made)}
    name = run_name("evaluate", config, made["changes"], run)
    with tracking.open_tracker(experiment_of(config), name, parent_run_id=parent_run_id or None, tags=tags) as tracker:
        metrics = evaluate_checkpoint(Path(checkpoint), data, Path(out), overrides)
        tracker.log_params(flatten(config))
        honest = metrics["protocols"].get("validation", metrics["protocols"].get("none", {}))
        numbers = {f"test/{name}": value for name, value in honest.items()}
        methods = {"": metrics, **{f"{name}/": results for name, results in metrics["comparators"].items()}}
        for method, results in methods.items():
            for protocol, values in results["protocols"].items():
                numbers |= {f"test/{method}{protocol}/{name}": value for name, value in values.items()}
        tracker.log_metrics(numbers)
        tracker.set_tags({"protocol": "validation" if "validation" in metrics["protocols"] else "none"})
        description = {tracking.DESCRIPTION: markdown_table(metrics)}
        tracker.set_tags(description)
        tracker.log_artifact(Path(out))
        if parent_run_id and not run:
            tracking.log_to_run(parent_run_id, metrics=numbers, tags=description)
        return metrics


def report(evaluation: str, checkpoint: str, bundle: str, out: str, parent_run_id: str = "") -> str:
    """Write report.html and results.md to ``out``; the page's path."""
    data = open_bundle(bundle)
    lineage = {"git sha": tracking.git_sha(), "MLflow run": parent_run_id or "-"}
    page = make_report(Path(evaluation), Path(checkpoint), data, Path(out), lineage)
    if parent_run_id:
        tracking.log_to_run(parent_run_id, artifacts=[page, Path(out) / "results.md"])
    return str(page)


def figures(
    checkpoint: str, bundle: str, out: str = "", baseline: str = "", images: int = 3, parent_run_id: str = ""
) -> list[str]:
    """Draw the paper's figures 3, 5, 6 and 7 into ``out`` (else figures/ of the checkpoint); the paths of all files.

    ``baseline``: a checkpoint to stand beside it. ``images``: how many of them figures 5 and 6 show.
    """
    data = open_bundle(bundle)
    config = read_config(Path(checkpoint))
    tags = {"bundle_sha256": data.sha256, "variant": variant(config), "step": "figures"}
    with tracking.open_tracker(
        experiment_of(config), f"figures-{variant(config)}", parent_run_id=parent_run_id or None, tags=tags
    ) as tracker:
        folder = Path(out) if out else Path(checkpoint) / "figures"
        files = draw_figures(Path(checkpoint), data, folder, Path(baseline) if baseline else None, images)
        for file in files:
            tracker.log_artifact(file)
    return [str(file) for file in files]


def predict(
    images: Sequence[str], checkpoint: str, classes: str = "", with_known: bool = False, top: int = 5, out: str = ""
) -> list[dict[str, Any]]:
    """The ``top`` classes of each image file with scores and reasons; with ``out`` also overlays and predictions.json.

    ``classes``: a CSV of new classes, to choose among instead of the checkpoint's own (``with_known``: beside them).
    """
    answers = Predictor.load(checkpoint, classes or None, with_known)(*images, top=top)
    results = [answer.to_dict() for answer in answers]
    if out:
        for result, overlay in zip(results, write_overlays(answers, Path(out)), strict=True):
            result["overlay"] = str(overlay)
        write_json(Path(out) / "predictions.json", results)
    return results
