"""Patch geometry, Eq. 4's scores, pseudo-labels and selection: against hand-made numbers and brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from svip.models.patches import (
    AttentionRollout,
    AttentionScores,
    block_index,
    group_scores,
    merge,
    pseudo_labels,
    select,
    unmerge,
)

SIDES = st.integers(1, 5).map(lambda half: 2 * half)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 30))
SCORES = arrays(np.float32, SHAPES, elements=st.floats(0, 1, width=32)).map(torch.from_numpy)
FEW_SCORES = arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])).map(torch.from_numpy)
"""Scores [B, G]; the second have many ties."""


def eq4_class_row(layers: list[tuple[Tensor, Tensor]], scale: float) -> NDArray[np.float64]:
    """Eq. 4 as printed: the class token's row of W^L, from the queries and keys of all layers, on full matrices."""
    maps = []
    for query, key in layers:
        logits = scale * (query.double() @ key.double().mT).numpy()
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        maps.append((attention / attention.sum(-1, keepdims=True)).sum(1))  # T^l: summed over heads
    total = maps[0]
    for attention in maps[1:]:
        total = total + total @ attention
    row: NDArray[np.float64] = total[:, 0]
    return row


def any_attention(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for models of all shapes, the paper's L = 12 and h = 12 among them."""
    shapes = given(
        layers=st.integers(1, 12),
        heads=st.integers(1, 12),
        tokens=st.integers(2, 20),
        sharpness=st.floats(0.1, 3),
        seed=st.integers(0, 2**32 - 1),
    )
    paper = example(layers=12, heads=12, tokens=20, sharpness=1.0, seed=0)
    return settings(deadline=None, max_examples=50)(shapes(paper(test)))


def queries_and_keys(layers: int, heads: int, tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, for two images: [2, h, T, 8]."""
    random = torch.Generator().manual_seed(seed)
    made = (torch.randn(2, 2, heads, tokens, 8, generator=random) for _ in range(layers))
    return [(query, key) for query, key in made]


def test_blocks_list_top_left_top_right_bottom_left_bottom_right() -> None:
    assert block_index((4, 6)).tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]


@pytest.mark.parametrize(("grid", "groups"), [((14, 14), 49), ((16, 16), 64), ((2, 10), 5)])
def test_every_token_is_in_one_block(grid: tuple[int, int], groups: int) -> None:
    index = block_index(grid)
    assert index.shape == (groups, 4)
    assert sorted(index.flatten().tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", [(15, 15), (14, 7), (3, 4)])
def test_odd_grid_is_refused_with_what_to_change(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} grid .*data.image_size"):
        block_index(grid)


def test_merge_puts_the_tokens_of_a_block_side_by_side() -> None:
    tokens = torch.tensor([[[n, 10.0 * n] for n in range(8)]])
    assert merge(tokens, block_index((2, 4))).tolist() == [
        [[0, 0, 1, 10, 4, 40, 5, 50], [2, 20, 3, 30, 6, 60, 7, 70]],
    ]


@settings(deadline=None)
@given(height=SIDES, width=SIDES, batch=st.integers(1, 3), channels=st.integers(1, 4))
def test_unmerge_is_the_inverse_of_merge(height: int, width: int, batch: int, channels: int) -> None:
    index = block_index((height, width))
    tokens = torch.rand(batch, height * width, channels)
    groups = torch.rand(batch, height * width // 4, 4 * channels)
    assert torch.equal(unmerge(merge(tokens, index), index), tokens)
    assert torch.equal(merge(unmerge(groups, index), index), groups)


@any_attention
def test_scores_are_eq4s_class_row_up_to_its_known_sum(
    layers: int, heads: int, tokens: int, sharpness: float, seed: int
) -> None:
    made = queries_and_keys(layers, heads, tokens, seed)
    scale = sharpness * 8**-0.5
    scores = AttentionScores()
    for query, key in made:
        scores(query, key, scale)
    assert scores.row is not None
    expected = eq4_class_row(made, scale)
    # each row of T^l sums to h, so that of W^L does to h (1 + h)^(L - 1): more than 1e13 for a ViT-B
    np.testing.assert_allclose(scores.row, expected / (heads * (1 + heads) ** (layers - 1)), rtol=1e-5)


def test_scores_stay_in_float32_under_autocast() -> None:
    random = torch.Generator().manual_seed(0)
    key = torch.eye(16).expand(1, 3, 16, 16)
    # with unit keys the products are the queries: multiples of 1/8 below 2, which bf16 holds exactly
    queries = [torch.randint(0, 16, (1, 3, 16, 16), generator=random) / 8 for _ in range(6)]
    scores = AttentionScores()
    with torch.autocast("cpu", torch.bfloat16):
        for query in queries:
            scores(query, key, 1.0)
    assert scores.row is not None and scores.row.dtype == torch.float32
    expected = eq4_class_row([(query, key) for query in queries], 1.0)
    np.testing.assert_allclose(scores.row, expected / (3 * 4**5), rtol=1e-5)


def test_scores_carry_no_gradient() -> None:
    scores = AttentionScores()
    for _ in range(3):
        scores(torch.rand(1, 2, 5, 4, requires_grad=True), torch.rand(1, 2, 5, 4, requires_grad=True), 0.5)
    assert scores.row is not None and not scores.row.requires_grad


@pytest.mark.parametrize("prefix", [1, 3])
def test_group_score_is_the_mean_of_its_block_without_prefix_tokens(prefix: int) -> None:
    scores = AttentionScores()
    scores.row = torch.cat([torch.full((1, prefix), 99.0), torch.arange(16.0)[None]], 1)
    assert group_scores(scores, prefix, block_index((4, 4))).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_group_scores_need_an_attention() -> None:
    for scores in (AttentionScores(), AttentionRollout()):
        with pytest.raises(RuntimeError, match="no attention has been seen"):
            group_scores(scores, 1, block_index((2, 2)))


@any_attention
def test_rollout_is_the_class_row_of_the_normalised_product_of_all_layers(
    layers: int, heads: int, tokens: int, sharpness: float, seed: int
) -> None:
    made = queries_and_keys(layers, heads, tokens, seed)
    scale = sharpness * 8**-0.5
    scores = AttentionRollout()
    product = torch.eye(tokens, dtype=torch.float64).expand(2, tokens, tokens)
    for query, key in made:
        scores(query, key, scale)
        mean = (query.double() @ key.double().mT * scale).softmax(-1).mean(1)
        step = mean + torch.eye(tokens)
        product = step / step.sum(-1, keepdim=True) @ product
    assert scores.row is not None
    np.testing.assert_allclose(scores.row, product[:, 0], rtol=1e-5)


def test_pseudo_labels_stretch_each_image_to_0_and_1() -> None:
    scores = torch.tensor([[2.0, 6.0, 3.0, 4.0], [0.005, 0.0075, 0.01, 0.005]])
    expected = torch.tensor([[0.0, 1.0, 0.25, 0.5], [0.0, 0.5, 1.0, 0.0]])
    torch.testing.assert_close(pseudo_labels(scores), expected)


def test_pseudo_labels_of_equal_scores_are_zero() -> None:
    assert pseudo_labels(torch.full((1, 3), 0.2)).tolist() == [[0, 0, 0]]


@settings(deadline=None)
@given(SCORES)
def test_pseudo_labels_are_within_0_and_1_and_keep_the_order(scores: Tensor) -> None:
    labels = pseudo_labels(scores)
    assert labels.shape == scores.shape
    assert labels.min() >= 0 and labels.max() <= 1
    assert (labels.gather(1, scores.argsort(1)).diff() >= 0).all()


def test_ties_go_to_the_earlier_group() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert select(scores, 3).tolist() == [[True, True, False, True, False], [True, True, True, False, False]]


@settings(deadline=None)
@given(scores=FEW_SCORES, data=st.data())
def test_selected_are_the_highest_of_each_image(scores: Tensor, data: st.DataObject) -> None:
    groups = scores.shape[1]
    count = data.draw(st.integers(1, groups))
    selected = select(scores, count)
    assert selected.dtype == torch.bool
    assert selected.sum(1).tolist() == [count] * len(scores)
    for row, mask in zip(scores.tolist(), selected, strict=True):
        best = sorted(range(groups), key=lambda group: (-row[group], group))[:count]
        assert mask.nonzero().flatten().tolist() == sorted(best)
