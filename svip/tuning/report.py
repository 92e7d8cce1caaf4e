"""What a study leaves: the best values as a preset, the table of its trials, its figures and their page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from svip.config import load_config, to_yaml
from svip.evaluation.figures import STYLE, to_svg
from svip.evaluation.pages import render
from svip.training.checkpoint import write_atomically, write_text
from svip.tuning.plots import history_figure, importance_figure, importances, slice_figure
from svip.tuning.space import Space, assignments, shown
from svip.tuning.study import Study

FILES = ("tuning.html", "best.yaml", "trials.csv", "history.png", "importance.png", "slice.png")
"""What write_report may write; the importance only where there are trials enough to tell it."""
ENOUGH = 10
"""Finished trials below which the page says that the importance means little."""
HONEST = "Chosen on the validation classes; it says nothing yet of the test set."


def best_trial(study: Study) -> FrozenTrial | None:
    """The finished trial of the highest H, the first of several; None where none has finished."""
    finished = [trial for trial in study.ended_well() if trial.state is TrialState.COMPLETE]
    return max(finished, key=lambda trial: float(trial.value or 0), default=None)


def write_report(study: Study, space: Space, preset: str, base: Path, out: Path) -> list[Path]:
    """Write FILES to ``out``; those that could be written. ``base``: the configuration that the trials vary.

    best.yaml is a preset as ``svip train -p`` takes it.
    """
    out.mkdir(parents=True, exist_ok=True)
    trials, best = [trial for trial in study.all_trials() if "discarded" not in trial.user_attrs], best_trial(study)
    table = trials_table(trials, space)
    write_atomically(out / "trials.csv", lambda path: table.to_csv(path, index=False))
    written = [out / "trials.csv"]
    if best is None:
        return written
    said = (
        f"# Trial {best.number} of study {study.name}, varying {preset}: H {best.value:.2f} on the validation classes."
    )
    write_text(out / "best.yaml", f"{said}\n# {HONEST}\n{to_yaml(load_config(str(base), assignments(best.params)))}")
    written.append(out / "best.yaml")

    figures: list[tuple[str, str, Figure]] = [
        ("history", "Each trial's H, and the best so far.", history_figure(trials)),
        (
            "slice",
            "H over each parameter; later trials are darker, the best is the diamond.",
            slice_figure(trials, space),
        ),
    ]
    shares = importances(study.load())
    if shares:
        finished = sum(trial.state is TrialState.COMPLETE for trial in trials)
        caption = "How much of it each parameter explains."
        if finished < ENOUGH:
            caption += f" Only {finished} trials have finished: so few say little of that."
        figures.insert(1, ("importance", caption, importance_figure(shares)))
    for name, _, figure in figures:
        _save_png(figure, out / f"{name}.png")
        written.append(out / f"{name}.png")
    ended = f"{len(study.ended_well())} of {study.trials} trials"
    page = render(
        "tuning",
        title=f"Tuning {preset}",
        about=f"Best: trial {best.number}, H {best.value:.2f} with {shown(best.params)}. {HONEST}",
        figures=[(caption, Markup(to_svg(figure, name, caption))) for name, caption, figure in figures],
        header=["trial", "state", "H", "epochs", *(parameter.key for parameter in space)],
        rows=_rows(table, space),
        made_with=f"{ended}; sampler {study.settings.sampler}, pruner {study.settings.pruner}, seed "
        f"{study.settings.seed}. H of a pruned trial is that of its last epoch.",
    )
    write_text(out / "tuning.html", page)
    return [out / "tuning.html", *written]


def trials_table(trials: Sequence[FrozenTrial], space: Space) -> pd.DataFrame:
    """One row an attempt: number, state, H, epochs, seconds, parameters, error, its MLflow run and what it resumed."""
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower(), "H": trial.value}
        row["epochs"] = len(trial.intermediate_values)
        row["seconds"] = round(trial.duration.total_seconds(), 1) if trial.duration else None
        row |= {parameter.key: trial.params.get(parameter.key) for parameter in space}
        row |= {name: trial.user_attrs.get(name) for name in ("slot", "resumes", "error", "run_id")}
        rows.append(row)
    return pd.DataFrame(rows)


def _rows(table: pd.DataFrame, space: Space) -> list[list[str]]:
    """Cells of the page: the finished trials from the best on, then the pruned ones."""
    ended = table[table["state"].isin(["complete", "pruned"])].sort_values(["state", "H"], ascending=[True, False])
    keys = [parameter.key for parameter in space]
    return [
        [str(row["trial"]), "finished" if row["state"] == "complete" else "pruned", f"{row['H']:.2f}"]
        + [str(row["epochs"]), *(_cell(row[key]) for key in keys)]
        for _, row in ended.iterrows()
    ]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _save_png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=160))
