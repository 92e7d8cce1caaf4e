"""Figures 3, 5, 6 and 7 of the paper: each function takes plain arrays and returns a matplotlib ``Figure``.

They share palette and style with the figures of a report.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from svip.evaluation.figures import PALETTE, STYLE, blank, hatch_unselected, readable

SHADES = LinearSegmentedColormap.from_list("shades", [PALETTE["paper"], PALETTE["accent"], PALETTE["ink"]])
COLOURS = [PALETTE[name] for name in ("accent", "orange", "green", "ink", "muted")]
MARKERS = "os^D"
"""Five colours times four markers tell twenty classes apart."""


@dataclass(frozen=True)
class LocalizationPanel:
    """One attribute in one image, as one model sees it."""

    model: str
    image: NDArray[np.uint8]
    """[S, S, 3]."""
    values: NDArray[np.float32]
    """[h, w]; NaN where the group was dropped."""
    selected: NDArray[np.bool_]
    """[h, w]."""


@matplotlib.rc_context(STYLE)
def attention_heatmap(
    layers: NDArray[np.float32], scores: NDArray[np.float32], columns: int, score: str = "Eq. 4"
) -> Figure:
    """Fig. 3: attention to the groups in each layer [n, L, G], above the scores [n, G] that ``score`` makes of all.

    Means of the n images; each row is scaled from its lowest to its highest group. columns: width of the groups'
    grid, whose rows are parted by thin lines. At the right: each layer's correlation with the aggregated score over
    the groups of an image, mean of all images.
    """
    _, depth, groups = layers.shape
    agreement = _correlation(layers, scores[:, None]).mean(0)  # [L]
    figure = blank(7.2, 0.9 + 0.2 * (depth + 1))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[depth, 1.3])
    for axes, rows in ((upper, layers.mean(0)), (lower, scores.mean(0)[None])):
        low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
        axes.imshow((rows - low) / np.maximum(high - low, np.finfo(np.float32).tiny), cmap=SHADES, aspect="auto")
        axes.vlines(np.arange(columns, groups, columns) - 0.5, -0.5, len(rows) - 0.5, color=PALETTE["muted"], lw=0.7)
        axes.tick_params(length=0)
    for layer, r in enumerate(agreement):
        upper.text(groups - 0.3, layer, f"r = {r:.2f}", va="center", fontsize=8.5, color=PALETTE["muted"])
    upper.set_yticks(range(depth), range(1, depth + 1))
    upper.set_ylabel("layer")
    lower.set_yticks([0], [score], color=PALETTE["ink"])
    lower.set_xticks(range(0, groups, columns), range(1, groups + 1, columns))
    lower.set_xlabel("merged group, row by row of the image")
    return figure


@matplotlib.rc_context(STYLE)
def localization_grid(
    images: Sequence[tuple[str, NDArray[np.uint8]]], panels: Sequence[Sequence[tuple[str, Sequence[LocalizationPanel]]]]
) -> Figure:
    """Fig. 5: a row an image: the image, then for each attribute its map by each model, side by side.

    images: (class name, uint8 [S, S, 3]) a row. panels: for each row (attribute name, one panel a model). Orange is
    high, scaled within each map over the groups that are read; the frame marks the highest of them. The groups that
    the model did not select are striped. A map is named after its model where there are several.
    """
    side, seam, gap = 1.26, 0.04, 0.2  # inches: of a map, between models, between attributes and at the edges
    above, below = 0.36, 0.4  # for titles, for names
    models = len(panels[0][0][1])
    pitch, wide = above + side + below, models * (side + seam) - seam
    width, height = gap + (side + gap) + len(panels[0]) * (wide + gap), pitch * len(images)
    figure = blank(width, height, layout=None)

    def place(left: float, row: int, name: str) -> Axes:
        top = row * pitch + above
        axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
        axes.text(0.5, -0.04, _wrap(name, 20), transform=axes.transAxes, ha="center", va="top", fontsize=7.5)
        axes.set_axis_off()
        return axes

    for row, ((name, image), attributes) in enumerate(zip(images, panels, strict=True)):
        place(gap, row, readable(name)).imshow(image)
        for number, (attribute, shown) in enumerate(attributes):
            left = gap + (side + gap) + number * (wide + gap)
            title = _wrap(readable(attribute.removeprefix("has_")), 19 * models)
            middle, bottom = (left + wide / 2) / width, 1 - (row * pitch + above - 0.08) / height
            figure.text(middle, bottom, title, ha="center", va="baseline", fontsize=8.5, linespacing=0.95)
            for k, panel in enumerate(shown):
                _draw_map(place(left + k * (side + seam), row, panel.model if models > 1 else ""), panel)
    return figure


@matplotlib.rc_context(STYLE)
def patch_selection(
    images: NDArray[np.uint8], selected: NDArray[np.bool_], points: NDArray[np.float32], related: NDArray[np.bool_]
) -> Figure:
    """Fig. 6: (a) images [n, S, S, 3] with their unselected groups [n, h, w] striped; (b) groups in the plane.

    points: t-SNE of the patch classifier's hidden features, [m, 2]; related: which of these groups are selected, [m].
    """
    tall = min(3, len(images))
    wide = -(-len(images) // tall)
    figure = blank(1.35 * wide + 5, 4.2)
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.35 * wide, 5])
    left, right = parts
    left.suptitle("(a) masked images", fontsize=9.5)
    places = np.ravel(left.subplots(tall, wide, squeeze=False))
    for axes in places:
        axes.set_axis_off()
    for axes, image, chosen in zip(places, images, selected, strict=False):
        hatch_unselected(axes, image, chosen)
    right.suptitle("(b) t-SNE of the patch classifier's hidden features", fontsize=9.5)
    axes = right.subplots()
    for kind, label, style in (
        (related, "selected", {"marker": "o", "color": PALETTE["accent"]}),
        (~related, "semantic-unrelated", {"marker": "x", "color": PALETTE["orange"]}),
    ):
        axes.scatter(*points[kind].T, s=14, linewidths=0.9, alpha=0.8, label=label, **style)
    _without_scale(axes)
    right.legend(loc="outside lower center", ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def attribute_clusters(
    panels: Sequence[tuple[str, NDArray[np.float32], float]], labels: NDArray[np.int64], names: Sequence[str]
) -> Figure:
    """Fig. 7: predicted attributes of images in the plane, a panel a model, a colour and marker a class (at most 20).

    panels: (model name, t-SNE [n, 2], silhouette score of the vectors themselves). labels: 0 to len(names) - 1, [n].
    """
    width = 4.1 * len(panels)
    names = [readable(name) for name in names]
    columns = max(1, int(width / (0.4 + 0.057 * max(map(len, names)))))  # inches of a legend's entry
    figure = blank(width, 3.9 + 0.2 * -(-len(names) // columns))
    for axes, (model, points, silhouette) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for label, name in enumerate(names):
            style: dict[str, Any] = {"marker": MARKERS[label // len(COLOURS)], "color": COLOURS[label % len(COLOURS)]}
            own = points[labels == label]
            axes.scatter(*own.T, s=22, linewidths=0.4, edgecolors=PALETTE["paper"], label=name, **style)
        axes.set_title(f"{model}: silhouette {silhouette:.2f}", fontsize=9.5)
        _without_scale(axes)
    entries = axes.get_legend_handles_labels()
    spaces = {"handletextpad": 0.1, "columnspacing": 1.0}
    figure.legend(*entries, loc="outside lower center", ncols=columns, fontsize=7.5, **spaces)
    return figure


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Pearson's r over the last axis."""
    one, other = (values - values.mean(-1, keepdims=True, dtype=np.float64) for values in (one, other))
    r: NDArray[np.float64] = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    return r


def _draw_map(axes: Axes, panel: LocalizationPanel) -> None:
    read = panel.selected & np.isfinite(panel.values)
    low, high = panel.values[read].min(), panel.values[read].max()
    heat = (np.where(read, panel.values, low) - low) / max(high - low, np.finfo(np.float32).tiny)
    (height, width), (rows, columns) = panel.image.shape[:2], heat.shape
    share = 0.85 * heat[np.arange(height) * rows // height][:, np.arange(width) * columns // width, None]
    grey = 0.5 * panel.image.mean(2, keepdims=True) + 127  # pale, so that the colour stands out
    mixed = grey * (1 - share) + 255 * np.array(to_rgb(PALETTE["orange"])) * share
    hatch_unselected(axes, mixed.astype(np.uint8), panel.selected)
    row, column = np.unravel_index(np.where(read, panel.values, -np.inf).argmax(), heat.shape)
    corner = (column * width / columns, row * height / rows)
    axes.add_patch(Rectangle(corner, width / columns, height / rows, fill=False, edgecolor=PALETTE["ink"], lw=1.6))


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, max_lines=2, placeholder="…")


def _without_scale(axes: Axes) -> None:
    """A t-SNE plane: its axes have no unit and no meaning."""
    axes.set(xticks=(), yticks=())
    for spine in axes.spines.values():
        spine.set(visible=True, color=PALETTE["rule"])
