"""The steps of the pipeline. The command line, a container and a Kubeflow component all call these same functions.

Arguments are plain strings and lists, so that every caller can pass them; what a step makes lies in ``out``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from svip import sweep, tracking
from svip.config import Config, flatten, load_config, variant
from svip.data.bundle_cache import check_bucket, make_in_bucket, open_bundle
from svip.data.bundle_cache import push_bundle as upload
from svip.data.prepare import plan_bundle
from svip.data.sources import is_remote
from svip.evaluation import comparison
from svip.evaluation.evaluate import check_bundle
from svip.evaluation.evaluate import evaluate as evaluate_checkpoint
from svip.evaluation.evaluate import report as make_report
from svip.evaluation.gallery import draw_figures
from svip.models.published import load_published
from svip.models.svip import SVIP
from svip.predict import Predictor, write_overlays
from svip.semantics.attributes import attribute_phrases, read_rules, shipped_rules
from svip.semantics.vectors import embed_attributes as look_up
from svip.semantics.vectors import read_embedding, read_vectors, write_embedding
from svip.training.checkpoint import CheckpointError, read_config, read_info, save_model, write_classes, write_json
from svip.training.loop import check_resumable
from svip.training.loop import train as train_model

log = logging.getLogger(__name__)


def open_run(pipeline: str, preset: str, overrides: Sequence[str] = ()) -> str:
    """Check the configuration, start the MLflow run that all steps belong to, and return its id."""
    config = load_config(preset, overrides)
    return tracking.open_run(pipeline, _experiment(config), flatten(config), {"preset": preset})


def prepare_data(out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Make the split bundle in ``out``; the content of its bundle.json.

    ``out``: a folder, or s3://bucket/prefix, for which the bundle is made in the cache of this machine and uploaded,
    unless the bucket has it. DataError for a http(s):// address.
    """
    if is_remote(out):
        check_bucket(out)
    plan = plan_bundle(load_config(preset, overrides))
    info = make_in_bucket(plan, out) if is_remote(out) else plan.make(Path(out)).info
    log.info("bundle %s: %s", info["sha256"][:12], _sentence(info["counts"]["images"]))
    return dict(info)


def push_bundle(bundle: str, to: str) -> str:
    """Upload a bundle to s3://bucket/prefix, from where every step takes it; its sha256."""
    check_bucket(to)
    data = open_bundle(bundle)
    upload(data, to)
    return data.sha256


def embed_attributes(bundle: str, out: str, preset: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look up the attributes' word vectors and write vectors.npy [A, V] and report.json to ``out``; the report."""
    config = load_config(preset, overrides)
    data = open_bundle(bundle)
    names = data.attribute_names
    vectors = config.semantics.vectors or str(data.path / "word_vectors.txt")
    if config.semantics.vectors is None and not Path(vectors).exists():
        raise FileNotFoundError(
            f"semantics.vectors is not set and {bundle} brings no word vectors; give some, such as a file of GloVe "
            "(--vectors glove.6B.300d.txt)"
        )
    own_rules = config.semantics.phrases
    rules = read_rules(Path(own_rules)) if own_rules else shipped_rules(data.info["dataset"])
    phrases = attribute_phrases(names, rules)
    embedding = look_up(phrases, names, vectors, config.semantics.pooling, config.semantics.allow_missing)
    write_embedding(embedding, Path(out))
    missing = embedding.report["missing_words"]
    log.info("%d attribute vectors of size %d", *embedding.vectors.shape)
    if missing:
        log.warning("%d words are not in %s: %s", len(missing), embedding.report["vectors_file"], ", ".join(missing))
    return dict(embedding.report)


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
    tags = {"preset": preset, "bundle_sha256": data.sha256, "step": "train", **_named(config, run)}
    with tracking.open_tracker(
        _experiment(config),
        f"train-{run or variant(config)}",
        parent_run_id=parent_run_id or None,
        run_id=record.read_text().strip() if record.exists() else None,
        tags=tags,
    ) as tracker:
        directory.mkdir(parents=True, exist_ok=True)
        record.write_text(tracker.run_id)
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
    tags = {"bundle_sha256": data.sha256, "step": "evaluate", **_named(config, run)}
    with tracking.open_tracker(
        _experiment(config), f"evaluate-{run or variant(config)}", parent_run_id=parent_run_id or None, tags=tags
    ) as tracker:
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
        tracker.log_artifact(Path(out))
        if parent_run_id and not run:
            tracking.log_to_run(parent_run_id, metrics=numbers)
        return metrics


def ablate(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    variants: Sequence[str] = ("all",),
    seeds: int = 3,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
) -> str:
    """Train and evaluate variants of Table 2 with seeds 0, 1, ... and write the table; the page's path.

    Each run lies in ``out``/VARIANT/seed-N. Finished ones are kept, begun ones go on. Raises FailedRuns at the end.
    """
    config, chosen = load_config(preset, overrides), sweep.ablation(variants)

    def write(results: comparison.Results) -> Path:
        return _write_ablation(config, chosen, results, Path(out), seeds, _made_with(preset, overrides, seeds))

    return _sweep("ablation", chosen, seeds, write, bundle, vectors, out, preset, overrides, parent_run_id)


def sensitivity(
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    parameters: Sequence[str] = ("all",),
    seeds: int = 3,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
) -> str:
    """Vary M, lambda1, lambda2 and sigma one at a time, and draw Figure 4; the page's path.

    ``out`` and errors are as in ``ablate``; what equals the preset is run once, as ``default``.
    """
    config = load_config(preset, overrides)
    panels = sweep.sensitivity(config, parameters)
    chosen = list({variant.name: variant for panel in panels for variant in panel.points.values()}.values())
    rows = [
        comparison.Row(variant.name, f"{panel.label} = {value:g}")
        for panel in panels
        for value, variant in panel.points.items()
    ]
    drawn = [
        (panel.label, panel.default, {value: variant.name for value, variant in panel.points.items()})
        for panel in panels
    ]

    def write(results: comparison.Results) -> Path:
        figure = comparison.sensitivity_figure(drawn, results, comparison.common_protocol(results))
        title, made_with = f"Sensitivity on {config.data.dataset}", _made_with(preset, overrides, seeds)
        return comparison.write_comparison(
            Path(out), "sensitivity", title, rows, results, "default", seeds, made_with, figure
        )

    return _sweep("sensitivity", chosen, seeds, write, bundle, vectors, out, preset, overrides, parent_run_id)


def plan_ablation(variants: Sequence[str], seeds: int) -> list[str]:
    """The names of an ablation's runs, such as ``no_psc:1``."""
    return [run.name for run in sweep.runs_of(sweep.ablation(variants), seeds)]


def ablate_table(
    evaluations: Sequence[str],
    out: str,
    runs: Sequence[str],
    preset: str,
    overrides: Sequence[str] = (),
    parent_run_id: str = "",
) -> str:
    """Write the table of an ablation whose runs were evaluated elsewhere, in any order; the page's path.

    An evaluation belongs to the run whose configuration it was made with; ValueError names a run that has none.
    """
    found = [sweep.read_metrics(Path(path)) for path in evaluations]
    chosen: dict[str, sweep.Variant] = {}
    results: dict[str, dict[int, Any]] = {}
    for name in runs:
        run = sweep.ablation_run(name)
        settings = json.loads(json.dumps(flatten(load_config(preset, [*overrides, *run.overrides]))))
        fitting = [metrics["protocols"] for metrics in found if metrics["settings"] == settings]
        if not fitting:
            raise ValueError(f"none of the {len(found)} evaluations has the configuration of run {name}")
        chosen.setdefault(run.variant.name, run.variant)
        results.setdefault(run.variant.name, {})[run.seed] = fitting[0]
    seeds = max(len(by_seed) for by_seed in results.values())
    rows = [variant for variant in sweep.ablation() if variant.name in chosen]
    made_with = _made_with(preset, overrides, seeds)
    page = _write_ablation(load_config(preset, overrides), rows, results, Path(out), seeds, made_with)
    if parent_run_id:
        tracking.log_to_run(parent_run_id, artifacts=sorted(page.parent.glob("ablation.*")))
    return str(page)


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


def _write_ablation(
    config: Config,
    variants: Sequence[sweep.Variant],
    results: comparison.Results,
    out: Path,
    seeds: int,
    made_with: str,
) -> Path:
    """Table 2; the paper's numbers stand beside those on the data that it used."""
    data = config.data
    papers = [variant.paper.get(data.dataset, ()) if data.split == "standard" else () for variant in variants]
    rows = [comparison.Row(variant.name, variant.label, paper) for variant, paper in zip(variants, papers, strict=True)]
    title = f"Ablation on {data.dataset}, {data.split} split"
    return comparison.write_comparison(out, "ablation", title, rows, results, "full", seeds, made_with)


def _made_with(preset: str, overrides: Sequence[str], seeds: int) -> str:
    changes = f" with {' '.join(overrides)}" if overrides else ""
    return f"Preset {preset}{changes}; {seeds} {'seed' if seeds == 1 else 'seeds'}."


def _sweep(
    name: str,
    variants: Sequence[sweep.Variant],
    seeds: int,
    write: Callable[[comparison.Results], Path],
    bundle: str,
    vectors: str,
    out: str,
    preset: str,
    overrides: Sequence[str],
    parent_run_id: str,
) -> str:
    """Work off a sweep under one MLflow run; ``write`` makes its table, anew after each of its runs."""
    data, embedding, directory = open_bundle(bundle), read_embedding(Path(vectors)), Path(out)
    runs = sweep.runs_of(variants, seeds)
    homes = sweep.homes_of(runs, preset, overrides)
    for run, (home, _) in homes.items():
        if home is not run:
            log.warning("%s has the configuration of %s, and so its numbers", run.name, home.name)

    def is_finished(run: sweep.Run) -> bool:
        folder, config = run.folder(directory), homes[run][1]
        if not (folder / "evaluation" / "metrics.json").exists():
            return False
        check_resumable(config, data, embedding.vectors, folder / "checkpoint")
        evaluated = sweep.read_metrics(folder / "evaluation")["settings"]
        return all(evaluated[f"evaluation.{key}"] == getattr(config.evaluation, key) for key in ("protocols", "eszsl"))

    def execute(run: sweep.Run) -> None:
        folder, config = run.folder(directory), homes[run][1]
        checkpoint = str(folder / "checkpoint")
        tags = {"preset": preset, "bundle_sha256": data.sha256, "variant": run.variant.name}
        with tracking.open_tracker(
            _experiment(config), run.name, parent_run_id=parent.run_id or None, tags=tags
        ) as own:
            train(bundle, vectors, checkpoint, preset, [*overrides, *run.overrides], own.run_id, log_model=False)
            # a checkpoint may have been saved with other ones, whether they came as overrides or with the preset
            again = [f"evaluation.{key}={json.dumps(value)}" for key, value in vars(config.evaluation).items()]
            evaluate(checkpoint, bundle, str(folder / "evaluation"), own.run_id, overrides=again)

    def show(finished: Sequence[sweep.Run]) -> None:
        results: dict[str, dict[int, Any]] = {}
        for run in runs:
            home = homes[run][0]
            if home in finished:
                metrics = sweep.read_metrics(home.folder(directory) / "evaluation")
                results.setdefault(run.variant.name, {})[run.seed] = metrics["protocols"]
        if results:
            write(results)

    tags = {"preset": preset, "bundle_sha256": data.sha256, "step": name}
    experiment = _experiment(load_config(preset, overrides))
    with tracking.open_tracker(experiment, name, parent_run_id=parent_run_id or None, tags=tags) as parent:
        try:
            with tracking.runs_of_their_own():
                sweep.work([run for run in runs if homes[run][0] is run], is_finished, execute, show)
        finally:
            for file in sorted(directory.glob(f"{name}.*")):
                parent.log_artifact(file)
    return str(directory / f"{name}.html")


def _named(config: Config, run: str) -> dict[str, str]:
    """Tags that say what is trained: the ablation's own name for it where there is one."""
    return {"variant": run.partition(":")[0] or variant(config), "seed": str(config.train.seed)}


def _experiment(config: Config) -> str:
    return f"svip/{config.data.dataset}"


def _sentence(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in counts.items())
