"""Tracked runs set side by side."""

from __future__ import annotations

import ast
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from svip import tracking
from svip.changes import NOT_OF_TRAINING, as_text, expanded
from svip.evaluation import run_comparison
from svip.evaluation.intervals import Answers
from svip.evaluation.metrics import ACCURACIES
from svip.evaluation.report import PROTOCOLS
from svip.evaluation.run_comparison import Comparison, Entry

log = logging.getLogger(__name__)

SORTS = (*ACCURACIES, "gamma", "name", "seed")
NO_SETTINGS = (*NOT_OF_TRAINING, "train.seed")
"""Beginnings of parameters by which a comparison doesn't tell runs apart: they change no number, or stand elsewhere."""


class CompareError(ValueError):
    """Runs that can't be compared so; the message says what there is instead."""


def compare(
    runs: Sequence[str] = (),
    experiment: str = "",
    query: str = "",
    protocol: str = "validation",
    sort: str = "H",
    out: str = "comparison",
) -> Comparison:
    """Compare evaluations that are tracked, and write comparison.md, .html and .csv to ``out``.

    ``runs``: ids, beginnings of ids, or names (see ``tracking.evaluations_of``); ``experiment``: all of it, or those
    that fit the ``query``. Runs that have no numbers of the ``protocol`` are left out, and named. Raises TrackingError
    or CompareError where nothing is left.
    """
    if not runs and not experiment:
        raise CompareError("name runs to compare, or an experiment (--experiment svip/cub)")
    if query and not experiment:
        raise CompareError("a filter chooses within an experiment; name one (--experiment svip/cub)")
    for name, value, allowed in (("protocol", protocol, tuple(PROTOCOLS)), ("sort", sort, SORTS)):
        if value not in allowed:
            raise CompareError(f"{name} {value!r}: expected one of {', '.join(allowed)}")
    found = tracking.evaluations_of(runs) + (tracking.search_evaluations(experiment, query) if experiment else [])
    tested = list({run.run_id: run for run in found}.values())
    fitting = [run for run in tested if f"test/{protocol}/H" in run.metrics]
    if not fitting:
        there = sorted({name for run in tested for name in _protocols(run)})
        raise CompareError(
            f"none of the {len(tested)} evaluations has numbers of the protocol {protocol!r}; they have "
            f"{', '.join(there) or 'none at all'} (--protocol)"
        )
    count = f"{len(fitting)} {'run' if len(fitting) == 1 else 'runs'}"
    log.info("comparing %s", count)
    with tempfile.TemporaryDirectory() as folder:
        entries = [_entry(run, protocol, Path(folder) / run.run_id) for run in fitting]
        comparison = run_comparison.compare(entries, protocol, sort)
    for run in tested:
        if run not in fitting:
            had = ", ".join(_protocols(run)) or "no numbers"
            comparison.notes.append(f"Left out: {run.run_id[:8]} ({run.name}), which has {had}.")
    without = [entry.run_id[:8] for entry in entries if entry.answers is None]
    if without and protocol != "published":
        comparison.notes.append(
            f"No intervals, for want of a predictions.npz that says what is unseen: {', '.join(without)}."
        )
    experiments = ", ".join(dict.fromkeys(run.experiment for run in fitting))
    run_comparison.write_comparison(comparison, Path(out), f"{count} of {experiments}")
    return comparison


def _protocols(run: tracking.Recorded) -> list[str]:
    return [name for name in PROTOCOLS if f"test/{name}/H" in run.metrics]


def _entry(run: tracking.Recorded, protocol: str, folder: Path) -> Entry:
    prefix = f"test/{protocol}/"
    numbers = {name.removeprefix(prefix): value for name, value in run.metrics.items() if name.startswith(prefix)}
    params = expanded({key: _parsed(value) for key, value in run.params.items()})
    return Entry(
        run_id=run.run_id,
        name=run.name,
        facts={**run.tags, "code": run.tags.get("git_sha", "")},
        settings={key: as_text(value) for key, value in params.items() if not key.startswith(NO_SETTINGS)},
        numbers=numbers,
        answers=None if protocol == "published" else _answers(run, numbers["gamma"], folder),
    )


def _answers(run: tracking.Recorded, gamma: float, folder: Path) -> Answers | None:
    """From the scores that the evaluation left; None without them, or where they don't say which classes are unseen."""
    path = run.download("predictions.npz", folder)
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as stored:
        if "unseen" not in stored:
            return None
        answers = Answers.of(stored["scores"], stored["labels"], stored["unseen"], gamma)
    path.unlink()  # hundreds of runs have gigabytes
    return answers


def _parsed(text: str) -> object:
    """A parameter as it was before MLflow made it text, where that is a number, a list or a mapping."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
