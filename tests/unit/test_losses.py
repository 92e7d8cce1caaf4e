"""Eqs. 6, 12 and 13 against distributions whose losses are worked out by hand, and SciPy."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax
from torch import Tensor

from svip.losses import classification, consistency, patch

KINDS = ("jeffreys", "jsd", "kl")
LOGITS = arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-30, 30))
"""The logits of both passes, [2, B, S]."""


def logits_of(*distributions: list[float]) -> Tensor:
    """Logits [B, S] of the distributions, shifted: softmax does not see it, but an implementation might."""
    return torch.tensor(distributions).log() + 3


def test_classification_is_the_mean_negative_log_probability_of_the_target() -> None:
    logits = logits_of([0.5, 0.25, 0.25], [0.625, 0.125, 0.25])
    expected = (log(2) + log(8)) / 2
    assert classification(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", 0.75 * log(3 / 2) + 0.25 * log(1 / 2)),
        ("jeffreys", (0.25 * log(3 / 2) - 0.25 * log(1 / 2)) / 2),
        ("jsd", (0.5 * log(4 / 5) + 0.5 * log(4 / 3) + 0.75 * log(6 / 5) + 0.25 * log(2 / 3)) / 2),
    ],
)
def test_divergences_of_a_fair_and_a_loaded_coin(kind: str, expected: float) -> None:
    source, contextualized = logits_of([0.5, 0.5]), logits_of([0.75, 0.25])
    assert consistency(source, contextualized, kind).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_is_the_mean_over_the_batch_not_over_classes(kind: str) -> None:
    source, contextualized = logits_of([0.5, 0.3, 0.2]), logits_of([0.1, 0.2, 0.7])
    alone = consistency(source, contextualized, kind)
    with_agreeing = consistency(torch.cat([source, source]), torch.cat([contextualized, source]), kind)
    torch.testing.assert_close(with_agreeing, alone / 2)


@settings(deadline=None)
@given(LOGITS)
def test_consistency_agrees_with_scipy(logits: NDArray[np.float64]) -> None:
    p, q = softmax(logits, -1)
    expected = {
        "kl": rel_entr(q, p),
        "jeffreys": (rel_entr(p, q) + rel_entr(q, p)) / 2,
        "jsd": (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)) / 2,
    }
    for kind, parts in expected.items():
        value = consistency(torch.from_numpy(logits[0]), torch.from_numpy(logits[1]), kind).item()
        assert value == pytest.approx(parts.sum(-1).mean(), rel=1e-6, abs=1e-7)


@settings(deadline=None)
@given(LOGITS)
def test_divergences_keep_their_bounds_and_symmetry(logits: NDArray[np.float64]) -> None:
    source, contextualized = torch.from_numpy(logits)
    rounding = 1e-6
    jeffreys, jsd, kl = (consistency(source, contextualized, kind).item() for kind in KINDS)
    assert jeffreys >= 0
    assert -rounding <= jsd <= min(log(2), jeffreys / 2) + rounding
    assert kl >= -rounding
    assert consistency(contextualized, source, "jeffreys").item() == pytest.approx(jeffreys, rel=1e-12)
    assert consistency(contextualized, source, "jsd").item() == pytest.approx(jsd, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_cost_nothing_whatever_the_shift_of_their_logits(kind: str) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert consistency(logits, logits + 2, kind).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("jsd", log(2)), ("jeffreys", 2e4), ("kl", 2e4)])
def test_certain_contradiction_stays_finite(kind: str, expected: float) -> None:
    source = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = consistency(source, -source.detach(), kind)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert source.grad is not None and source.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_learn_from_the_consistency(kind: str) -> None:
    source = logits_of([0.5, 0.3, 0.2]).requires_grad_()
    contextualized = logits_of([0.1, 0.2, 0.7]).requires_grad_()
    consistency(source, contextualized, kind).backward()
    for logits in (source, contextualized):
        assert logits.grad is not None and logits.grad.abs().min() > 0


def test_unknown_consistency_is_named() -> None:
    with pytest.raises(ValueError, match="'js': expected jeffreys, jsd or kl"):
        consistency(torch.zeros(1, 2), torch.zeros(1, 2), "js")


def test_patch_loss_is_the_mean_cross_entropy_of_each_group() -> None:
    logits = torch.tensor([[log(3), log(3)], [0.0, -log(3)]])  # probabilities 3/4, 3/4, 1/2, 1/4
    targets = torch.tensor([[1.0, 0.0], [0.5, 0.25]])
    expected = (log(4 / 3) + log(4) + log(2) + 0.25 * log(4) + 0.75 * log(4 / 3)) / 4
    assert patch(logits, targets).item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.floats(-5, 5))
def test_patch_loss_is_least_where_the_probability_is_the_target(target: float, other: float) -> None:
    targets = torch.full((1, 1), target, dtype=torch.float64)
    least = patch(targets.logit(), targets)
    assert least <= patch(torch.full_like(targets, other), targets) + 1e-12
