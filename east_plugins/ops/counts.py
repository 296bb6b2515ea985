"""Integer budgets: how many weights each layer gets, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError


def apportion(weights: Sequence[float], total: int, lower: int | Sequence[int], upper: Sequence[int]) -> list[int]:
    """Split `total` over layers in proportion to `weights`, each within [lower, upper]; the sum is exact.

    Layers that would pass a bound are set to it and the rest is shared anew (the water-filling that ERK does with
    dense layers); fractions are rounded by largest remainder, equal remainders going to the earlier layer. Where
    all remaining weights are zero the rest is shared in proportion to the room left.

    Raises `UsageError` where `total` is below the sum of `lower` or above the sum of `upper`.
    """
    most = np.asarray(upper, dtype=np.int64)
    least = np.broadcast_to(np.asarray(lower, dtype=np.int64), most.shape)
    factors = np.asarray(weights, dtype=np.float64)
    if (largest := factors.max(initial=0)) > 0:
        factors = factors / largest
        factors = np.where(factors < 1e-200, 0, factors)  # no share at all, and no overflow below
    if not least.sum() <= total <= most.sum():
        raise UsageError(f"{total} active weights cannot be split: allowed are {least.sum()} to {most.sum()}")
    share = _bounded_shares(factors, total, least, most)
    counts = np.clip(np.floor(share + 1e-9).astype(np.int64), least, most)
    remainder = np.where(counts < most, np.round(share - counts, 9), -np.inf)
    short = total - int(counts.sum())
    counts[np.argsort(-remainder, kind="stable")[:short]] += 1
    return counts.tolist()


def _bounded_shares(weights, total, lower, upper):
    """Real-valued shares: `clip(factor * weights, lower, upper)` with the factor that makes them sum to `total`."""
    if (np.where(weights > 0, upper, lower)).sum() < total:  # the positive weights alone cannot take it all
        full = np.where(weights > 0, upper, lower).astype(np.float64)
        room = upper - full
        return full + room * ((total - full.sum()) / room.sum())
    low, high = 0.0, 1.0
    while np.clip(high * weights, lower, upper).sum() < total:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * weights, lower, upper).sum() < total else (low, middle)
    share = np.clip(high * weights, lower, upper)
    free = (share > lower) & (share < upper)
    if free.any():  # remove the bisection's last error, so that equal cases round equally
        share[free] = weights[free] * ((total - share[~free].sum()) / weights[free].sum())
    return share
