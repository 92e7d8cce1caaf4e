"""The report of one experiment: a self-contained HTML page and a Markdown table, made from what evaluation wrote.

Pure functions of tables and arrays: no model, no tracking, no network. The page is built once, in memory, and asks for
nothing when opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from svip.evaluation import figures
from svip.evaluation.metrics import ACCURACIES
from svip.evaluation.numbers import rounded
from svip.evaluation.pages import render
from svip.training.checkpoint import write_text

PROTOCOLS = {
    "validation": "gamma chosen on the validation classes",
    "none": "no calibration, gamma = 0",
    "oracle": "oracle: gamma chosen on the test set, not a result",
    "published": "published: chosen on the test set, by sample, not a result",
}
"""What the tables say of each protocol; these come first and in this order."""
MAX_EXAMPLES = 12
"""Examples shown on a page; each costs about 60 kB."""


@dataclass(frozen=True)
class Example:
    """One test image with what the model looked at and what it answered."""

    image: np.ndarray
    """uint8 [S, S, 3], as the model saw it."""
    name: str
    """True class."""
    role: str
    """seen or unseen."""
    selected: np.ndarray
    """bool [h, w] over the merged groups: True where the group belongs to S_M."""
    predictions: Sequence[tuple[str, float, bool]]
    """(class name, score, is it the true class), best first; the first three are shown."""
    mask: np.ndarray | None = None
    """[S, S], non-zero on the object, where the data set knows it."""
    attributes: Sequence[tuple[str, float]] = ()
    """(attribute name, its predicted value): what decided for the first prediction."""


@dataclass(frozen=True)
class Row:
    """A row of the results table, all numbers already formatted."""

    method: str
    protocol: str
    note: str
    values: tuple[str, ...]  # T1, U, S, H, gamma
    is_result: bool = False
    on_test: bool = False  # gamma chosen on the test set


def write_report(
    out_dir: Path,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    per_class: pd.DataFrame | None = None,
    curve: pd.DataFrame | None = None,
    examples: Sequence[Example] = (),
    lineage: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html`` and ``results.md`` to ``out_dir`` and return the path of the page.

    metrics: content of metrics.json, all accuracies and patch shares in percent; its ``settings`` (flat or nested) are
    listed as the full configuration. history: rows of history.json. per_class: columns class, role, images,
    accuracy_zsl, accuracy_gzsl. curve: columns gamma, seen, unseen. lineage: name -> text. Whatever is missing or
    empty is left out of the page. ValueError names the table and the columns that it lacks.
    """
    _require(per_class, "per_class", ("class", "role", "images", "accuracy_zsl", "accuracy_gzsl"))
    _require(curve, "curve", ("gamma", "seen", "unseen"))
    lineage = lineage or {}
    settings = dict(_flatten(metrics.get("settings", {})))
    classes = pd.DataFrame() if per_class is None else per_class
    page = render(
        "report",
        title=_title(metrics, settings, lineage),
        sentence=_sentence(metrics, settings, lineage),
        rows=result_rows(metrics),
        curve=_curve_svg(metrics, curve),
        ausuc=rounded(metrics.get("ausuc"), 3),
        training=_training_svgs(history),
        class_bars=_class_svgs(classes),
        classes=[_class_cells(row) for row in _sorted(classes).to_dict("records")],
        examples=[_example(example) for example in examples[:MAX_EXAMPLES]],
        example_count=len(examples),
        patches=_patch_sentence(metrics.get("patch_selection")),
        lineage=lineage,
        counts=[(f"{what}, {name}", f"{n:,}") for what, name, n in _counts(metrics)],
        settings=settings,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(out_dir / "results.md", markdown_table(metrics))
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def result_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Rows of the results table: the trained model at each protocol, each comparator at each, chance."""
    rows = []
    trained = method_name(metrics)
    methods = [(trained, metrics.get("protocols", {}))]
    methods += [(name.upper(), results["protocols"]) for name, results in metrics.get("comparators", {}).items()]
    for method, protocols in methods:
        for protocol in sorted(protocols, key=lambda name: [*PROTOCOLS, name].index(name)):
            rows.append(
                Row(
                    method,
                    protocol,
                    PROTOCOLS.get(protocol, protocol),
                    _cells(protocols[protocol]),
                    is_result=method == trained and protocol == "validation",
                    on_test=protocol in ("oracle", "published"),
                )
            )
    if metrics.get("chance"):
        rows.append(Row("Chance", "", "a class drawn at random", _cells(metrics["chance"])))
    return rows


def method_name(metrics: Mapping[str, Any]) -> str:
    """What was trained, such as SVIP, SVIP-readout=cls or Baseline."""
    name = str(metrics.get("method", "svip"))
    return name.replace("svip", "SVIP", 1) if name.startswith("svip") else name.capitalize()


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """The results table as Markdown, the result in bold; accuracies in percent."""
    lines = ["| method | protocol | T1 | U | S | H | gamma |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in result_rows(metrics):
        cells = [_markdown(row.method), _markdown(row.note), *row.values]
        lines.append("| " + " | ".join(f"**{cell}**" if row.is_result else cell for cell in cells) + " |")
    about = "Accuracies in percent, mean of per-class top-1. Bold: the result."
    return "\n".join([*lines, "", about, ""])


def _title(metrics: Mapping[str, Any], settings: Mapping[str, Any], lineage: Mapping[str, str]) -> str:
    method = method_name(metrics)
    dataset = settings.get("data.dataset") or lineage.get("dataset")
    names = {"cub": "CUB", "awa2": "AwA2", "sun": "SUN", "apy": "aPY", "synthetic": "synthetic data"}
    return f"{method} on {names.get(dataset, dataset)}" if dataset else method


def _sentence(metrics: Mapping[str, Any], settings: Mapping[str, Any], lineage: Mapping[str, str]) -> str:
    """What was run, in one sentence made of what is known."""
    parts = []
    if lineage.get("preset"):
        changed = " with changes" if lineage.get("changed overrides") else ""
        parts.append(f"Preset {lineage['preset']}{changed}")
    if settings.get("data.split"):
        fold = f" (fold {settings['data.fold']})" if settings.get("data.fold") else ""
        parts.append(f"{settings['data.split']} split{fold}")
    parts += [f"seed {lineage['seed']}"] if lineage.get("seed") else []
    number = {(what, name): n for what, name, n in _counts(metrics)}
    tested = [number[what, "test_unseen"] for what in ("images", "classes") if (what, "test_unseen") in number]
    if len(tested) == 2:
        seen = f" and {number['images', 'test_seen']:,} of seen ones" if ("images", "test_seen") in number else ""
        parts.append(f"tested on {tested[0]:,} images of {tested[1]:,} unseen classes{seen}")
    if lineage.get("minutes"):
        device = f" on {lineage['device']}" if lineage.get("device") else ""
        parts.append(f"{lineage['minutes']} minutes{device}")
    sentence = ", ".join(parts) or "A zero-shot learning experiment"
    return sentence[0].upper() + sentence[1:] + "."


def _counts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    for what, by_role in metrics.get("counts", {}).items():
        for name, number in by_role.items() if isinstance(by_role, Mapping) else [("all", by_role)]:
            yield what, name, number


def _curve_svg(metrics: Mapping[str, Any], curve: pd.DataFrame | None) -> Markup | None:
    if curve is None or curve.empty:
        return None
    label = "Accuracy on seen against unseen classes for every gamma of calibrated stacking"
    return _svg(figures.seen_unseen_curve(curve, metrics.get("protocols", {})), "curve", label)


def _training_svgs(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    keys = {key for row in history for key, value in row.items() if value is not None}
    charts = []
    if any(key.startswith("train/loss") for key in keys):
        charts.append(("Training losses", _svg(figures.loss_curves(history), "losses", "Training losses by epoch")))
    if any(key.startswith("val/") for key in keys):
        label = "Validation T1, U, S and H by epoch"
        charts.append(("Validation accuracies", _svg(figures.validation_curves(history), "validation", label)))
    return charts


def _class_svgs(classes: pd.DataFrame) -> list[tuple[str, Markup]]:
    charts = []
    for role in ("unseen", "seen"):
        count = 0 if classes.empty else int((classes["role"] == role).sum())
        if count:
            svg = _svg(figures.class_bars(classes, role), role, f"Accuracy of {role} classes, the worst first")
            charts.append((f"{count} {role} classes", svg))
    return charts


def _sorted(classes: pd.DataFrame) -> pd.DataFrame:
    return classes if classes.empty else classes.sort_values(["role", "accuracy_gzsl"], ascending=[False, True])


def _class_cells(row: Mapping[Any, Any]) -> tuple[str, str, str, str, str]:
    zsl, gzsl = rounded(row["accuracy_zsl"]), rounded(row["accuracy_gzsl"])
    return str(row["class"]), str(row["role"]), f"{int(row['images']):,}", zsl, gzsl


def _example(example: Example) -> dict[str, Any]:
    top = list(example.predictions)[:3]
    longest = max([score for _, score, _ in top if math.isfinite(score)], default=0.0)
    bars = [
        {"name": name, "score": f"{score:.2g}", "width": _percent(score, longest), "right": bool(right)}
        for name, score, right in top
    ]
    return {
        "image": figures.to_data_uri(figures.example_tile(example.image, example.selected, example.mask)),
        "name": example.name,
        "role": example.role,
        "right": bool(top and top[0][2]),
        "chosen": f"{int(example.selected.sum())} of {example.selected.size}",
        "outlined": example.mask is not None,
        "predictions": bars,
        "attributes": [(name, rounded(value, 2)) for name, value in example.attributes],
    }


def _patch_sentence(shares: Mapping[str, float] | None) -> str | None:
    if not shares:
        return None
    share = {name: rounded(shares.get(name)) for name in shares}
    recall, precision = share.get("object_recall", "-"), share.get("object_precision", "-")
    return (
        f"Against the true object masks: the selected patches cover {recall} % of the object (as many patches drawn at "
        f"random: {share.get('random_recall', '-')} %), and {precision} % of them lie on it (at random: "
        f"{share.get('random_precision', '-')} %)."
    )


def _svg(figure: Any, name: str, label: str) -> Markup:
    return Markup(figures.to_svg(figure, name, label))


def _cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    return (*(rounded(values.get(name)) for name in ACCURACIES), rounded(values.get("gamma"), 3))


def _percent(part: float, whole: float) -> str:
    return f"{100 * max(0.0, part) / whole:.0f}" if whole > 0 and math.isfinite(part) else "0"


def _markdown(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _require(table: pd.DataFrame | None, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if table is not None and column not in table.columns]
    if missing and table is not None:
        raise ValueError(f"{name}: lacks the columns {missing}; it has {list(table.columns)}")
