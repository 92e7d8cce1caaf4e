"""Numbers over several runs, and as tables show them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation with n - 1; NaN where there are too few values."""
    return (
        float(np.mean(values)) if values else math.nan,
        float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
    )


def rounded(value: float | None, digits: int = 1, sign: str = "") -> str:
    """``61.2``; a dash where there is no number. ``sign``: + to have it in any case."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def rounded_with_spread(value: float, spread: float, sign: str = "") -> str:
    """``61.2 ± 0.4``, without what is NaN."""
    return rounded(value, sign=sign) + ("" if math.isnan(spread) or math.isnan(value) else f" ± {spread:.1f}")
