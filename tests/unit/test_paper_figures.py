"""The paper's figures show what their arrays hold: panels, stripes, frames, colours, numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle

from svip.evaluation import paper_figures
from svip.evaluation.gallery import _spread
from svip.evaluation.inference import deciding, distinctions
from svip.evaluation.paper_figures import LocalizationPanel

SIDE = 32
PHOTO = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png")  # the layout is made here, and may fail
    return figure


def striped_groups(axes: Axes) -> int:
    """Groups under a hatched patch: a path of five corners each."""
    hatched = [patch for patch in axes.patches if isinstance(patch, PathPatch) and patch.get_hatch()]
    return sum(len(np.asarray(patch.get_path().vertices)) // 5 for patch in hatched)


def heat(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def panel(model: str, values: np.ndarray, selected: np.ndarray) -> LocalizationPanel:
    return LocalizationPanel(model, PHOTO, values.astype(np.float32), selected.astype(bool))


def test_the_heat_map_scales_each_layer_and_tells_its_correlation_with_equation_4() -> None:
    scores = np.array([[1, 2, 3, 5], [5, 3, 2, 1]], np.float32)
    layers = np.stack([10 * scores + 7, -scores, np.array([[0, 0, 0, 1], [0, 0, 0, 1]], np.float32)], 1)
    figure = drawn(paper_figures.attention_heatmap(layers, scores, columns=2))
    upper, lower = figure.axes
    # mean over both images 6, 5, 5, 6 in the score: 1, 0, 0, 1 once scaled
    np.testing.assert_allclose(heat(lower), [[1, 0, 0, 1]])
    np.testing.assert_allclose(heat(upper), [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1]], atol=1e-6)
    # the third layer: +r in one image (5 is 2.25 above the mean, root of 3/4 * 8.75 below), -r' in the other
    third = (2.25 - 1.75) / np.sqrt(0.75 * 8.75) / 2
    assert [text.get_text() for text in upper.texts] == ["r = 1.00", "r = -1.00", f"r = {third:.2f}"]


def test_localization_has_a_panel_for_each_model_and_attribute_and_stripes_only_what_is_unselected() -> None:
    everything, some = np.ones((4, 4)), np.eye(4)
    values = np.arange(16.0).reshape(4, 4)
    row = [(name, [panel("Baseline", values, everything), panel("SVIP", values, some)]) for name in ("has_a::b", "c")]
    figure = drawn(paper_figures.localization_grid([("001.Black_bird", PHOTO), ("wren", PHOTO)], [row, row]))
    assert [striped_groups(axes) for axes in figure.axes] == 2 * [0, 0, 12, 0, 12]
    assert [text.get_text() for text in figure.texts] == 2 * ["a: b", "c"]
    assert [axes.texts[0].get_text() for axes in figure.axes[:3]] == ["Black bird", "Baseline", "SVIP"]


@pytest.mark.parametrize("models", [1, 2])
def test_localization_names_a_map_only_beside_another_models_and_has_even_margins(models: int) -> None:
    maps = [panel(f"model {k}", np.eye(4), np.ones((4, 4))) for k in range(models)]
    figure = drawn(paper_figures.localization_grid([("wren", PHOTO)], [[("a", maps), ("b", maps)]]))
    names = [f"model {k}" for k in range(models)] if models > 1 else [""]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["wren", *names, *names]
    photo, last = figure.axes[0].get_window_extent(), figure.axes[-1].get_window_extent()
    assert photo.x0 == pytest.approx(figure.bbox.x1 - last.x1)
    assert photo.x0 > 0.1 * figure.dpi  # a tenth of an inch


@pytest.mark.parametrize("dropped", [False, True])
def test_the_frame_is_at_the_highest_selected_group_although_another_is_higher(dropped: bool) -> None:
    values, selected = np.zeros((2, 4)), np.ones((2, 4))
    values[0, 1], selected[0, 1] = np.nan if dropped else 9, 0
    values[1, 2] = 3
    figure = drawn(paper_figures.localization_grid([("a", PHOTO)], [[("b", [panel("SVIP", values, selected)])]]))
    axes = figure.axes[1]
    (frame,) = (patch for patch in axes.patches if isinstance(patch, Rectangle))
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((16, 16), 8, 16)
    shown = heat(axes).astype(int)
    strongest = np.abs(shown - [0xC4, 0x56, 0x0C]).sum(-1)  # nearest to the palette's orange: the framed group alone
    assert strongest[16:, 16:24].max() < strongest[:16].min()


def test_a_map_of_one_value_can_be_drawn() -> None:
    row = [("b", [panel("SVIP", np.full((2, 2), 0.5), np.ones((2, 2)))])]
    drawn(paper_figures.localization_grid([("a", PHOTO)], [row]))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_patch_selection_masks_each_image_and_marks_the_two_kinds_apart(count: int) -> None:
    selected = np.zeros((count, 4, 4), bool)
    selected[:, 0] = True
    points = np.arange(20, dtype=np.float32).reshape(10, 2)
    related = np.arange(10) < 3
    figure = drawn(paper_figures.patch_selection(np.stack([PHOTO] * count), selected, points, related))
    *images, plane = figure.axes
    assert [striped_groups(axes) for axes in images if axes.images] == [12] * count
    circles, crosses = plane.collections
    np.testing.assert_array_equal(circles.get_offsets(), points[:3])
    np.testing.assert_array_equal(crosses.get_offsets(), points[3:])
    assert circles.get_label() == "selected"


def test_twenty_classes_have_twenty_looks_and_the_title_tells_the_silhouette() -> None:
    points = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    labels = np.repeat(np.arange(20), 3)
    names = [f"{number:03}.Bird_{number}" for number in range(20)]
    figure = drawn(
        paper_figures.attribute_clusters([("Baseline", points, 0.254), ("SVIP", -points, 0.5)], labels, names)
    )
    assert [axes.get_title() for axes in figure.axes] == ["Baseline: silhouette 0.25", "SVIP: silhouette 0.50"]
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        assert len(axes.collections) == 20
        np.testing.assert_array_equal(axes.collections[7].get_offsets(), sign * points[21:24])
        looks = {(str(c.get_facecolor()), str(c.get_paths()[0].vertices)) for c in axes.collections}
        assert len(looks) == 20
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"Bird {number}" for number in range(20)]
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0


def test_deciding_attributes_are_shown_and_rarer_in_other_classes() -> None:
    # at unit length [.67, .67, 0, .33] and [.71, 0, .71, 0], so means .69, .33, .35, .17
    classes = np.array([[1, 1, 0, 0.5], [1, 0, 1, 0]], np.float32)
    predicted = np.array([[9, 1, 9, 3], [9, 5, 0.9, 2]], np.float32)
    # above the mean: .33 of the second and .17 of the fourth for class 0, .02 of the first and .35 of the third for 1
    chosen = deciding(predicted, np.maximum(distinctions(classes, classes), 0), 2)
    assert chosen[0].tolist() == [3, 1]
    assert chosen[1, 0] == 2


def test_a_spread_keeps_order_and_reaches_over_all_rows() -> None:
    assert _spread(np.arange(100, 112), 3).tolist() == [102, 106, 110]
    assert _spread(np.arange(4), 9).tolist() == [0, 1, 2, 3]
