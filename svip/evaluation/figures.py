"""The figures of a report: each function takes plain tables or arrays and returns a matplotlib ``Figure``.

One palette serves all of them. Its colours stay apart for colour-blind readers, and no figure says anything by colour
alone. ``to_svg`` turns the palette into CSS variables, so that a page can show the same figure on light and on dark.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

PALETTE = {
    "paper": "#fefefe",
    "ink": "#1d2228",
    "muted": "#68707c",
    "rule": "#dcdfe4",
    "accent": "#0b66a3",
    "orange": "#c4560c",
    "green": "#178a66",
}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # a class name may hold a dollar sign
    "axes.edgecolor": PALETTE["muted"],
    "axes.facecolor": "none",
    "axes.labelcolor": PALETTE["ink"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.7,
    "hatch.linewidth": 1.1,
    "legend.frameon": False,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "svg.fonttype": "none",  # real text: in the page's own font, selectable, small
}
LOSSES = (
    ("train/loss", "total", "ink", 2.0),
    ("train/loss_cls", "classes", "accent", 1.3),
    ("train/loss_consistency", "consistency", "orange", 1.3),
    ("train/loss_patch", "patches", "green", 1.3),
)
ACCURACIES = (
    ("val/T1", "T1", "green", 1.3),
    ("val/U", "U", "orange", 1.3),
    ("val/S", "S", "muted", 1.3),
    ("val/H", "H", "accent", 2.2),
)
PHASES = {"select": "solid", "final": (0, (3.5, 1.8))}
POINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("gamma = 0", {"marker": "s", "color": PALETTE["ink"], "markerfacecolor": PALETTE["paper"]}),
    "validation": ("validation", {"marker": "o", "color": PALETTE["accent"], "markersize": 8}),
    "oracle": (
        "oracle (not a result)",
        {"marker": "D", "color": PALETTE["orange"], "markerfacecolor": PALETTE["paper"]},
    ),
}
CURVE_POINTS = 400
"""Points drawn of a seen-unseen curve; the exact one has a step for each test image, far below what an eye can see."""


@matplotlib.rc_context(STYLE)
def loss_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training losses by epoch, one line a loss; solid for the phase ``select``, dashed for ``final``."""
    figure, axes = _figure(4.9, 3.4)
    values = [value for key, *_ in LOSSES for phase in PHASES for value in _series(history, phase, key)[1]]
    if values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _draw_history(axes, history, LOSSES)
    axes.set_ylabel("loss")
    return figure


@matplotlib.rc_context(STYLE)
def validation_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation T1, U, S and H (percent) by epoch, with a dot at the epoch of the best H of the phase ``select``."""
    figure, axes = _figure(4.9, 3.4)
    epochs, best = _series(history, "select", "val/H")
    if best:
        top = int(np.argmax(best))
        dot: dict[str, Any] = {"color": PALETTE["accent"], "markersize": 6, "clip_on": False, "zorder": 3}
        axes.plot(epochs[top], best[top], "o", label=f"best H {best[top]:.1f}", **dot)
    _draw_history(axes, history, ACCURACIES, bottom=0)
    axes.set_ylabel("validation accuracy, %")
    return figure


@matplotlib.rc_context(STYLE)
def seen_unseen_curve(curve: pd.DataFrame, points: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seen against unseen accuracy for every gamma of calibrated stacking; the shaded area is the AUSUC.

    curve: columns gamma, seen, unseen (percent). points: protocol -> metrics with S and U (percent); ``none``,
    ``validation`` and ``oracle`` are marked. The thin lines join points of equal harmonic mean H.
    """
    figure, axes = _figure(4.9, 4.3)
    ordered = curve.sort_values("gamma")
    keep = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), CURVE_POINTS)).astype(int))
    unseen, seen = ordered["unseen"].to_numpy(float)[keep], ordered["seen"].to_numpy(float)[keep]
    marked = {name: point for name, point in points.items() if name in POINTS and _finite(point, "U", "S")}
    right = 1.06 * max([1.0, *unseen, *(point["U"] for point in marked.values())])
    top = 1.06 * max([1.0, *seen, *(point["S"] for point in marked.values())])
    _draw_equal_h(axes, right, top)
    axes.fill_between(unseen, seen, color=PALETTE["accent"], alpha=0.09, linewidth=0)
    axes.plot(unseen, seen, color=PALETTE["accent"], linewidth=1.6)
    for name, (label, style) in POINTS.items():
        if name in marked:
            point = marked[name]
            axes.plot(point["U"], point["S"], linestyle="none", label=label, markeredgewidth=1.6, zorder=3, **style)
    if marked:
        _legend_above(figure, len(marked))
    axes.set(xlim=(0, right), ylim=(0, top), xlabel="U, accuracy on unseen classes, %")
    axes.set_ylabel("S, accuracy on seen classes, %")
    return figure


@matplotlib.rc_context(STYLE)
def class_bars(per_class: pd.DataFrame, role: str, ends: int = 15) -> Figure:
    """Accuracy of each class of one role (``seen`` or ``unseen``) as horizontal bars, the worst on top.

    per_class: columns class, role, images, accuracy_zsl, accuracy_gzsl (percent, NaN where it does not apply). With
    more than ``2 * ends`` classes only the ``ends`` worst and best are drawn, and the gap says how many are left out.
    The bar is the accuracy among all classes (GZSL); the ring is the accuracy among the unseen classes alone (ZSL).
    """
    ordered = per_class[per_class["role"] == role].sort_values(["accuracy_gzsl", "class"], na_position="first")
    hidden = max(0, len(ordered) - 2 * ends)
    shown = pd.concat([ordered.head(ends), ordered.tail(ends)]) if hidden else ordered
    places = np.arange(len(shown), dtype=float)
    if hidden:
        places[ends:] += 1.4
    span = float(places[-1]) + 1 if len(places) else 1.0
    figure, axes = _figure(4.9, 0.55 + 0.195 * span)
    colour = PALETTE["accent"] if role == "unseen" else PALETTE["muted"]
    gzsl, zsl = shown["accuracy_gzsl"].to_numpy(float), shown["accuracy_zsl"].to_numpy(float)
    bars = axes.barh(places, np.nan_to_num(gzsl), height=0.62, color=colour, alpha=0.8, label="among all classes")
    if np.isfinite(zsl).any():
        ring: dict[str, Any] = {
            "markerfacecolor": PALETTE["paper"],
            "color": PALETTE["ink"],
            "markersize": 5,
            "clip_on": False,
        }
        rings = axes.plot(zsl, places, "o", label=f"among {role} classes only", **ring)
        _legend_above(figure, 2, handles=[bars, *rings])
    for place, value in zip(places, gzsl, strict=True):
        text = f"{value:.0f}" if np.isfinite(value) else "-"
        axes.text(1.03, place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8.5)
    if hidden:
        middle = ends + 0.2
        axes.text(0, middle, f"⋯ {hidden} classes between", color=PALETTE["muted"], va="center", fontsize=8.5)
    axes.set_yticks(places, [_shorten(readable(name)) for name in shown["class"]], color=PALETTE["ink"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 108), ylim=(span - 0.4, -0.6), xticks=(0, 25, 50, 75, 100))
    axes.spines["bottom"].set_bounds(0, 100)
    axes.grid(axis="x")
    return figure


@matplotlib.rc_context(STYLE)
def example_tile(
    image: np.ndarray,
    selected: np.ndarray,
    mask: np.ndarray | None = None,
    patches: Sequence[tuple[int, int] | None] = (),
) -> Figure:
    """A test image without frame: unselected groups hatched, the object's true outline drawn if its mask is known.

    image: uint8 [H, W, 3]. selected: bool [h, w] over the merged groups. mask: [H, W], non-zero on the object.
    patches: row and column of groups to frame, numbered from 1 in this order; None only counts.
    """
    height, width = image.shape[:2]
    figure = blank(2.3, 2.3 * height / width, layout=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    hatch_unselected(axes, image, selected)
    stroke: list[Any] = [withStroke(linewidth=3.2, foreground="#1d2228")]
    if mask is not None and mask.any() and not mask.all():
        pixels = (np.arange(width) + 0.5, np.arange(height) + 0.5)
        outline = axes.contour(*pixels, mask != 0, levels=[0.5], colors="#ffd23f", linewidths=1.6)
        outline.set_path_effects(stroke)
    cell = np.array([width / selected.shape[1], height / selected.shape[0]])
    for patch in dict.fromkeys(filter(None, patches)):
        corner = cell * patch[::-1]
        axes.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="#ffd23f", linewidth=1.6, path_effects=stroke))
        numbers = ",".join(str(n) for n, other in enumerate(patches, 1) if other == patch)
        label = axes.annotate(numbers, corner + cell / 2, ha="center", va="center", color="#ffd23f", fontweight="bold")
        label.set_path_effects(stroke)
    return figure


@matplotlib.rc_context(STYLE)
def hatch_unselected(axes: Axes, image: np.ndarray, selected: np.ndarray) -> None:
    """Draw an image on ``axes`` with the merged groups that are not selected dimmed and striped, as in Fig. 5.

    image: uint8 [H, W, 3]. selected: bool [h, w], True where the group belongs to S_M; the grid divides the image
    evenly, whatever the sizes. ValueError if either has another shape.
    """
    if image.ndim != 3 or image.shape[2] != 3 or selected.ndim != 2:
        raise ValueError(f"expected image [H, W, 3] and selected [h, w], found {image.shape} and {selected.shape}")
    (height, width), (rows, columns) = image.shape[:2], selected.shape
    axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_axis_off()
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)], dtype=float) * (width / columns, height / rows)
    origins = np.argwhere(~selected.astype(bool))[:, ::-1] * (width / columns, height / rows)
    if len(origins):
        # One path for all groups: the stripes run on from group to group.
        path = Path.make_compound_path(*(Path(corners + origin, closed=True) for origin in origins))
        axes.add_patch(PathPatch(path, facecolor=(0.08, 0.09, 0.11, 0.5), linewidth=0))
        axes.add_patch(PathPatch(path, facecolor="none", hatch="////", edgecolor=(1, 1, 1, 0.75), linewidth=0))


def blank(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of that size in inches, with a canvas of its own: pyplot's global state is not touched."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor=PALETTE["paper"])
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element to put into HTML: no size, no metadata, no address, colours as variables.

    name: prefix of its element ids, unique within the page. label: what a screen reader says in its place.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, value in PALETTE.items():
        body = re.sub(rf"(?<=[:\s]){value}(?=[;\"])", f"var(--{colour})", body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">{body.strip()}'


def to_data_uri(figure: Figure, dpi: int = 200) -> str:
    """The figure as a JPEG data URI (a photo under stripes is ten times smaller so than as PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=dpi, pil_kwargs={"quality": 84, "optimize": True})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def readable(name: object) -> str:
    """A class or attribute name in plain words: ``001.Black_footed_Albatross`` -> ``Black footed Albatross``."""
    words = re.sub(r"^\d+\.(?=\D)", "", str(name)).replace("::", ": ")
    return re.sub(r"[_+\s]+", " ", words).strip() or str(name)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = blank(width, height)
    return figure, figure.add_subplot()


def _draw_history(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    lines: Iterable[tuple[str, str, str, float]],
    bottom: float | None = None,
) -> None:
    ends: list[tuple[float, str, str]] = []
    drawn: list[str] = []
    for key, label, colour, width in lines:
        last: tuple[float, float] | None = None
        for phase, dashes in PHASES.items():
            epochs, values = _series(history, phase, key)
            if values:
                marker = "o" if len(values) == 1 else None
                axes.plot(epochs, values, color=PALETTE[colour], linewidth=width, linestyle=dashes, marker=marker)
                drawn += [phase] if phase not in drawn else []
                last = max(last or (epochs[-1], values[-1]), (epochs[-1], values[-1]))
        if last is not None:
            ends.append((last[1], label, PALETTE[colour]))
    if len(drawn) == 2:
        for phase in drawn:
            axes.plot([], [], color=PALETTE["muted"], linestyle=PHASES[phase], label=f"{phase} phase")
    named, _ = axes.get_legend_handles_labels()
    if named:
        _legend_above(axes.get_figure(root=True), len(named))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if axes.dataLim.width == 0:  # a single epoch
        axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x0 + 0.5)
    axes.margins(x=0.02)
    axes.grid(axis="y")
    axes.set_ylim(bottom, axes.get_ylim()[1])  # from here on the limits stand, as the labels need them
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Name the lines at the right edge, moved apart to ``gap`` (share of the axis) where they would overlap."""
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((0.0, y)))[1] for y, _, _ in ends]
    below = -np.inf
    for index in np.argsort(heights):
        below = max(heights[index], below + gap)
        _, label, colour = ends[index]
        axes.text(1.015, below, label, color=colour, transform=axes.transAxes, va="center")


def _draw_equal_h(axes: Axes, right: float, top: float) -> None:
    step = 20 if right + top > 80 else 10
    for level in range(step, 100, step):
        unseen = np.linspace(level / 2 + 0.01, right, 200) if level / 2 < right else np.empty(0)
        seen = level * unseen / (2 * unseen - level)
        inside = seen <= top
        if inside.any() and unseen[inside][0] < 0.92 * right:
            axes.plot(unseen[inside], seen[inside], color=PALETTE["rule"], linewidth=0.8, zorder=0)
            start = unseen[inside][0], seen[inside][0]
            axes.annotate(f"H {level}", start, (1, 1), textcoords="offset points", color=PALETTE["muted"], fontsize=7.5)


def _legend_above(figure: Any, columns: int, **options: Any) -> None:
    figure.legend(**options, loc="outside upper left", ncols=columns, fontsize=9, handletextpad=0.5, columnspacing=1.4)


def _series(history: Sequence[Mapping[str, Any]], phase: str, key: str) -> tuple[list[float], list[float]]:
    rows = sorted((row["epoch"], row[key]) for row in history if row.get("phase") == phase and _finite(row, key))
    return [float(epoch) for epoch, _ in rows], [float(value) for _, value in rows]


def _finite(row: Mapping[str, Any], *keys: str) -> bool:
    return all(row.get(key) is not None and np.isfinite(row[key]) for key in keys)


def _shorten(name: str, length: int = 32) -> str:
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"
