"""Steps that train and evaluate many models and set them side by side: the ablation and the sensitivity."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svip import sweep, tracking
from svip.config import Config, flatten, load_config
from svip.data.bundle_cache import open_bundle
from svip.data.transfer import locked
from svip.evaluation import comparison
from svip.semantics.vectors import read_embedding
from svip.steps.model import evaluate
from svip.steps.runs import experiment_of, run_of_folder
from svip.steps.training import train
from svip.training.loop import check_resumable

log = logging.getLogger(__name__)


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
    """Work off a sweep under one MLflow run, which is opened again when it goes on; one process at a time does.

    ``write`` makes its table, anew after each of its runs.
    """
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
        with run_of_folder(folder, experiment_of(config), run.name, parent.run_id, tags) as own:
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
    experiment = experiment_of(load_config(preset, overrides))
    with locked(directory, inside=True), run_of_folder(directory, experiment, name, parent_run_id, tags) as parent:
        try:
            with tracking.runs_of_their_own():
                sweep.work([run for run in runs if homes[run][0] is run], is_finished, execute, show)
        finally:
            for file in sorted(directory.glob(f"{name}.*")):
                parent.log_artifact(file)
    return str(directory / f"{name}.html")
