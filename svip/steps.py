"""The steps of the pipeline. The command line, a container and a Kubeflow component all call these same functions.

Arguments are plain strings and lists, so that every caller can pass them; what a step makes lies in ``out``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from svip import tracking
from svip.config import Config, flatten, load_config, variant
from svip.data.bundle import read_bundle
from svip.data.prepare import prepare_data as make_bundle
from svip.evaluation.evaluate import check_bundle
from svip.evaluation.evaluate import evaluate as evaluate_checkpoint
from svip.evaluation.evaluate import report as make_report
from svip.evaluation.gallery import draw_figures
from svip.models.published import load_published
from svip.models.svip import SVIP
from svip.predict import Predictor, write_overlays
from svip.semantics.attributes import attribute_phrases
from svip.semantics.vectors import embed_attributes as look_up
from svip.semantics.vectors import read_embedding, read_vectors, write_embedding
from svip.training.checkpoint import read_config, save_model, write_classes, write_json
from svip.training.loop import check_resumable
from svip.training.loop import train as train_model

log = logging.getLogger(__name__)


def open_run(pipeline: str, preset: str, overrides: Sequence[str] = ()) -> str:
    """Check the configuration, start the MLflow run that all steps belong to, and return its id."""
    config = load_config(preset, overrides)
    return tracking.open_run(pipeline, _experiment(config), flatten(config), {"preset": preset})


def prepare_data(out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Make the split bundle in ``out``; the content of its bundle.json."""
    bundle = make_bundle(load_config(preset, overrides), Path(out))
    log.info("bundle %s: %s", bundle.sha256[:12], _sentence(bundle.info["counts"]["images"]))
    return dict(bundle.info)


def embed_attributes(bundle: str, out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look up the attributes' word vectors and write vectors.npy [A, V] and report.json to ``out``; the report."""
    config = load_config(preset, overrides)
    data = read_bundle(Path(bundle))
    names = data.attribute_names
    vectors = Path(config.semantics.vectors) if config.semantics.vectors else data.path / "word_vectors.txt"
    if config.semantics.vectors is None and not vectors.exists():
        raise FileNotFoundError(
            f"semantics.vectors is not set and {bundle} brings no word vectors; give a file in GloVe's text format "
            "(--vectors glove.6B.300d.txt)"
        )
    phrases = attribute_phrases(data.info["dataset"], names)
    embedding = look_up(phrases, names, vectors, config.semantics.pooling, config.semantics.allow_missing)
    write_embedding(embedding, Path(out))
    missing = embedding.report["missing_words"]
    log.info("%d attribute vectors of size %d", *embedding.vectors.shape)
    if missing:
        log.warning("%d words are not in %s: %s", len(missing), vectors, ", ".join(missing))
    return dict(embedding.report)


def train(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
    resume: bool = True,
) -> dict[str, Any]:
    """Train into ``out``, going on from what is there (``resume`` False: refuse to).

    The run id, and T1, U, S, H on the validation classes where they were used.
    """
    config = load_config(preset, overrides)
    data, embedding, directory = read_bundle(Path(bundle)), read_embedding(Path(vectors)), Path(out)
    made_with = {name: data.info[name] for name in ("dataset", "split", "fold")} | data.info.get("settings", {})
    for name in sorted(made_with.keys() - {"allow_missing"}):  # what is saved has to be what ran
        if getattr(config.data, name) != made_with[name]:
            raise ValueError(
                f"data.{name}={getattr(config.data, name)} (preset {preset}), but the bundle {bundle} has "
                f"{made_with[name]}; use the preset that it was made with, or override data.{name}={made_with[name]}"
            )
    if embedding.names != data.attribute_names:
        raise ValueError(f"{vectors} was made for other attributes than those of {bundle}; run embed-attributes again")
    if not resume and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; resume it (--resume), or train into another --out")
    check_resumable(config, data, embedding.vectors, directory)  # before the run of what is there is reopened
    record = directory / "run_id"
    tags = {"preset": preset, "bundle_sha256": data.sha256, "variant": variant(config), "step": "train"}
    with tracking.open_tracker(
        _experiment(config),
        f"train-{variant(config)}",
        parent_run_id=parent_run_id or None,
        run_id=record.read_text().strip() if record.exists() else None,
        tags=tags,
    ) as tracker:
        directory.mkdir(parents=True, exist_ok=True)
        record.write_text(tracker.run_id)
        tracker.log_params(flatten(config))

        def report_epoch(metrics: Mapping[str, float], epoch: int, phase: str) -> None:
            # both phases have an epoch 1: the final one's losses get a name of their own
            names = {
                name: f"final_{name}" if phase == "final" and name.startswith("train/") else name for name in metrics
            }
            tracker.log_metrics({names[name]: value for name, value in metrics.items()}, epoch)

        info = train_model(config, data, embedding.vectors, directory, report_epoch)
        logged = directory / "logged_run_id"  # a rerun adds no second model to the run
        if not logged.exists() or logged.read_text() != tracker.run_id:
            for name in ("config.yaml", "model.json", "history.json"):
                tracker.log_artifact(directory / name)
            tracking.log_checkpoint_model(tracker, directory)
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
    data = read_bundle(Path(bundle)) if bundle else None
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
        if data:
            write_classes(temporary, data.classes)
        save_model(temporary, model, config, info)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def evaluate(checkpoint: str, bundle: str, out: str, parent_run_id: str = "") -> dict[str, Any]:
    """Evaluate a checkpoint on the test images by every protocol of its configuration; metrics.json's content."""
    data = read_bundle(Path(bundle))
    config = read_config(Path(checkpoint))
    tags = {"bundle_sha256": data.sha256, "variant": variant(config), "step": "evaluate"}
    with tracking.open_tracker(
        _experiment(config), f"evaluate-{variant(config)}", parent_run_id=parent_run_id or None, tags=tags
    ) as tracker:
        metrics = evaluate_checkpoint(Path(checkpoint), data, Path(out))
        tracker.log_params(flatten(config))
        honest = metrics["protocols"].get("validation", metrics["protocols"].get("none", {}))
        numbers = {f"test/{name}": value for name, value in honest.items()}
        methods = {"": metrics, **{f"{name}/": results for name, results in metrics["comparators"].items()}}
        for method, results in methods.items():
            for protocol, values in results["protocols"].items():
                numbers |= {f"test/{method}{protocol}/{name}": value for name, value in values.items()}
        tracker.log_metrics(numbers)
        tracker.set_tags({"protocol": "validation" if "validation" in metrics["protocols"] else "none"})
        tracker.log_artifact(Path(out))
        if parent_run_id:
            tracking.log_to_run(parent_run_id, metrics=numbers)
        return metrics


def report(evaluation: str, checkpoint: str, bundle: str, out: str, parent_run_id: str = "") -> str:
    """Write report.html and results.md to ``out``; the page's path."""
    data = read_bundle(Path(bundle))
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
    data = read_bundle(Path(bundle))
    config = read_config(Path(checkpoint))
    tags = {"bundle_sha256": data.sha256, "variant": variant(config), "step": "figures"}
    with tracking.open_tracker(
        _experiment(config), f"figures-{variant(config)}", parent_run_id=parent_run_id or None, tags=tags
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


def close_run(run_id: str, status: str) -> None:
    """End the parent run: FINISHED, FAILED or KILLED."""
    tracking.close_run(run_id, status)


def _experiment(config: Config) -> str:
    return f"svip/{config.data.dataset}"


def _sentence(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items())
