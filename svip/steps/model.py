"""Steps that look at a model, and the one that takes over a released one."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from svip import tracking
from svip.changes import run_name
from svip.config import flatten, load_config, variant
from svip.data.bundle_cache import open_bundle
from svip.evaluation.evaluate import check_bundle
from svip.evaluation.evaluate import evaluate as evaluate_checkpoint
from svip.evaluation.evaluate import report as make_report
from svip.evaluation.gallery import draw_figures
from svip.evaluation.report import markdown_table
from svip.models.published import load_published
from svip.models.svip import SVIP
from svip.predict import Predictor, write_overlays
from svip.semantics.vectors import read_vectors
from svip.steps.provenance import lineage_tags, record_lineage, used_data
from svip.steps.runs import MADE_OF, experiment_of, made_of, made_of_checkpoint, named
from svip.training import distributed
from svip.training.checkpoint import read_config, read_info, save_model, write_classes, write_json

log = logging.getLogger(__name__)


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
        log.warning("whether %s was trained on images that %s tests is unknown", file, bundle)
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
    this is one of many (``run``, as in ``train``). Processes that torchrun has started share the images.
    """
    with distributed.joined():
        return _evaluate(checkpoint, bundle, out, parent_run_id, run, overrides)


def _evaluate(
    checkpoint: str, bundle: str, out: str, parent_run_id: str, run: str, overrides: Sequence[str]
) -> dict[str, Any]:
    data = open_bundle(bundle)
    config = read_config(Path(checkpoint), overrides)
    check_bundle(Path(checkpoint), config, read_info(Path(checkpoint)), data)  # before there is a run to fail
    trained_by = Path(checkpoint) / "run_id"
    train_run_id = trained_by.read_text().strip() if trained_by.exists() else ""
    made = made_of_checkpoint(Path(checkpoint), config, read_config(Path(checkpoint)))
    tags = {
        "step": "evaluate",
        tracking.TRAIN_RUN_TAG: train_run_id,
        **lineage_tags(config, data, bundle),
        **named(config, run, made),
    }
    with tracking.open_tracker(
        experiment_of(config),
        run_name("evaluate", config, made["changes"], run),
        parent_run_id=parent_run_id or None,
        tags=tags,
        enabled=distributed.is_main(),
    ) as tracker:
        record_lineage(tracker, config, data, bundle)
        metrics = evaluate_checkpoint(Path(checkpoint), data, Path(out), overrides)
        tracker.log_params(flatten(config))
        honest = metrics["protocols"].get("validation", metrics["protocols"].get("none", {}))
        numbers = {f"test/{name}": value for name, value in honest.items()}
        methods = {"": metrics, **{f"{name}/": results for name, results in metrics["comparators"].items()}}
        for method, results in methods.items():
            for protocol, values in results["protocols"].items():
                numbers |= {f"test/{method}{protocol}/{name}": value for name, value in values.items()}
        tracking.log_results(tracker, numbers, train_run_id, used_data(data, bundle, "testing"))
        tracker.set_tags({"protocol": "validation" if "validation" in metrics["protocols"] else "none"})
        description = {tracking.DESCRIPTION: markdown_table(metrics)}
        tracker.set_tags(description)
        tracker.log_artifact(Path(out))
        if parent_run_id and not run and distributed.is_main():
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
