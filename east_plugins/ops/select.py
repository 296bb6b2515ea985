"""Exact selection: how a score becomes a set of positions of exactly the wanted size."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024


def top_k(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of the `k` highest scores among the `eligible` positions; shape [k], order unspecified.

    Exactly `k` for any scores: NaN counts as the lowest value, and equal scores at the boundary are chosen at
    random by `generator`, so that a layer without gradient explores instead of filling its first neurons. The
    choice depends on the scores' values and the generator only, not on the device. `scores` and `eligible` have
    one shape; the caller sees to it that at least `k` positions are eligible.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    if not any(scores.stride()):  # one value expanded over the layer: every position ties with every other
        return random_k(k, eligible, generator)
    scores = torch.where(eligible, scores, -torch.inf).reshape(-1).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    candidates = _at_least_kth_block_maximum(scores, k, eligible.reshape(-1))
    values = scores[candidates]
    cut = values.topk(k, sorted=False).values.min()
    above, tied = candidates[values > cut], candidates[values == cut]
    return torch.cat([above, tied[choose(len(tied), k - len(above), generator).to(tied.device)]])


def lowest_k(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of the `k` lowest scores among the few `eligible` positions; otherwise as `top_k`."""
    positions = eligible.reshape(-1).nonzero().flatten()
    values = scores.reshape(-1)[positions]
    everywhere = torch.ones(len(positions), dtype=torch.bool, device=values.device)
    return positions[top_k(values.neg(), k, everywhere, generator)]


def random_k(k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of `k` eligible positions, every subset equally likely."""
    flat = eligible.reshape(-1)
    if flat.numel() > 16 * k:  # few are wanted: draw positions and keep the eligible ones, if that is enough
        drawn = choose(flat.numel(), min(2 * k + 16, flat.numel()), generator).to(flat.device)
        drawn = drawn[flat[drawn]]
        if len(drawn) >= k:
            return drawn[:k]
    positions = flat.nonzero().flatten()
    return positions[choose(len(positions), k, generator).to(positions.device)]


def choose(n: int, k: int, generator: torch.Generator) -> Tensor:
    """`k` distinct integers of range(n) in random order, on the CPU; every subset equally likely."""
    if k == n:
        return torch.arange(n)
    if 4 * k > n:
        return torch.randperm(n, generator=generator)[:k]
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < k:
        more = torch.randint(n, (k + k // 2 + 8,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]]


def _at_least_kth_block_maximum(scores: Tensor, k: int, eligible: Tensor) -> Tensor:
    """Positions that can be among the k highest, found in one pass.

    The k-th largest of the maxima of disjoint blocks is at most the k-th largest score, so nothing below it is
    needed. With k small against the layer this leaves a few times k positions to select from.
    """
    blocks = scores.numel() // _BLOCK
    if blocks <= k:
        return eligible.nonzero().flatten()
    maxima = scores[: blocks * _BLOCK].view(blocks, _BLOCK).amax(1)
    bound = maxima.topk(k, sorted=False).values.min()
    return ((scores >= bound) & eligible).nonzero().flatten()
