"""Learning rates over the course of a training, by hand."""

from __future__ import annotations

import math

import pytest

from svip.config import OptimConfig
from svip.training.optim import rate_factor


def test_step_schedule_falls_to_four_fifths_every_five_epochs() -> None:
    config = OptimConfig(epochs=30, schedule="step")
    factors = [rate_factor(config, epoch * 10 + 9, steps_per_epoch=10) for epoch in (0, 4, 5, 9, 10, 29)]
    assert factors == pytest.approx([1, 1, 0.8, 0.8, 0.64, 0.8**5])


def test_warm_up_rises_linearly_to_the_full_rate_and_cosine_falls_to_nothing() -> None:
    config = OptimConfig(epochs=10, schedule="cosine", warmup=0.1)  # 100 steps, 10 of them to warm up
    assert [rate_factor(config, step, 10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate_factor(config, 10, 10) == 1
    assert rate_factor(config, 55, 10) == pytest.approx(0.5)  # half of the remaining 90 steps
    assert rate_factor(config, 99, 10) == pytest.approx(0.5 * (1 - math.cos(math.pi / 90)))


def test_constant_schedule_is_constant() -> None:
    assert {rate_factor(OptimConfig(epochs=2, schedule="constant"), step, 3) for step in range(6)} == {1.0}
