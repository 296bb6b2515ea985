"""How alike two topologies are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UsageError


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Weights active in both of two sets of masks over those active in any, in [0, 1]; 1 where none is active.

    Raises `UsageError` where the masks are not of one network.
    """
    if {name: mask.shape for name, mask in a.items()} != {name: mask.shape for name, mask in b.items()}:
        raise UsageError("the masks are of different networks")
    both = sum(int((mask & b[name]).sum()) for name, mask in a.items())
    either = sum(int((mask | b[name]).sum()) for name, mask in a.items())
    return both / either if either else 1.0


def mean_jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The mean over layers of their Jaccard indices, in [0, 1] (Nowak et al. 2023, equation 1). Raises as `jaccard`."""
    each = [jaccard({name: mask}, {name: b[name]}) for name, mask in a.items() if name in b]
    if a.keys() != b.keys():
        raise UsageError("the masks are of different networks")
    return sum(each) / len(each)


def expected_jaccard(a: int, b: int, n: int) -> float:
    """The expected Jaccard index of random sets of `a` and `b` of `n` things, every set equally likely: the mean of
    x / (a + b - x), x hypergeometric. For large sets about p q / (p + q - p q), with p = a / n and q = b / n."""
    if not 0 <= min(a, b) <= max(a, b) <= n:
        raise UsageError(f"sets of {a} and {b} of {n} things cannot be")
    if a == b == 0:
        return 1.0
    middle, spread = a * b / n, 40 * math.sqrt(a * b / n + 1)  # all but 1e-16 of the probability
    low, high = max(0, a + b - n, math.floor(middle - spread)), min(a, b, math.ceil(middle + spread))
    x = torch.arange(low, high + 1, dtype=torch.float64)

    def choose(total: Tensor | float, some: Tensor) -> Tensor:
        total = torch.as_tensor(total, dtype=torch.float64)
        return torch.lgamma(total + 1) - torch.lgamma(some + 1) - torch.lgamma(total - some + 1)

    weight = torch.softmax(choose(a, x) + choose(n - a, b - x), 0)
    return float((weight * x / (a + b - x)).sum())


def expected_mean_jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor], among: Mapping[str, Tensor]) -> float:
    """What `mean_jaccard` is expected to be of random sets as large as those of `a` and `b` in each layer, drawn from
    the weights of `among`."""
    each = [expected_jaccard(int(a[n].sum()), int(b[n].sum()), int(mask.sum())) for n, mask in among.items()]
    return sum(each) / len(each)


def shared(masks: Sequence[Mapping[str, Tensor]]) -> tuple[float, float]:
    """Weights active in all of several masks, as a share of those active in one, and weights inactive in all, as a
    share of those inactive in one (the mean over the masks, where they differ)."""
    total = {name: torch.stack([each[name] for each in masks]).sum(0) for name in masks[0]}
    counts = [sum(int((t == number).sum()) for t in total.values()) for number in (len(masks), 0)]
    active = sum(int(t.sum()) for t in total.values()) / len(masks)
    inactive = sum(t.numel() for t in total.values()) - active
    return counts[0] / active if active else 1.0, counts[1] / inactive if inactive else 1.0


def expected_shared(masks: Sequence[Mapping[str, Tensor]]) -> tuple[float, float]:
    """What `shared` is expected to be of independent random masks with the same counts in each layer."""
    kept = removed = active = inactive = 0.0
    for name, mask in masks[0].items():
        shares = [float(each[name].double().mean()) for each in masks]
        kept += mask.numel() * math.prod(shares)
        removed += mask.numel() * math.prod(1 - share for share in shares)
        active += mask.numel() * sum(shares) / len(shares)
        inactive += mask.numel() * (1 - sum(shares) / len(shares))
    return kept / active if active else 1.0, removed / inactive if inactive else 1.0
