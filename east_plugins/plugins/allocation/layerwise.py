"""Allocations: how a global number of active weights is split over layers.

A rule returns each layer's weight in the split; `budgets` makes integers of it that sum exactly, no layer under 1
weight or over its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ...errors import UsageError
from ...ops.counts import apportion
from ...ops.select import random_k
from ..protocols import LayerShare
from ..registry import allocation


@allocation.register("ERK")
def erk(shape: Sequence[int]) -> float:
    """Density proportional to sum(shape) / numel: Erdos-Renyi kernel (RigL, Evci et al. 2020)."""
    return sum(shape)


@allocation.register("ER")
def er(shape: Sequence[int]) -> float:
    """Density proportional to (in + out) / (in * out): Erdos-Renyi, kernel sizes left out (SET)."""
    return (shape[0] + shape[1]) * math.prod(shape[2:])


@allocation.register("uniform")
def uniform(shape: Sequence[int]) -> float:
    """The same density in every layer."""
    return math.prod(shape)


@allocation.register("EPL")
def epl(shape: Sequence[int]) -> float:
    """The same number of active weights in every layer (DCTpS, Price and Tanner 2021)."""
    return 1


@allocation.register("EPF")
def epf(shape: Sequence[int]) -> float:
    """The same number of active weights for every filter (DCTpS, Price and Tanner 2021)."""
    return shape[0]


def budgets(share: str | LayerShare, shapes: Mapping[str, Sequence[int]], total: int) -> dict[str, int]:
    """Active weights of every layer under an allocation, or one of that name: integers that sum to `total`.

    Raises `UnknownNameError`, or `UsageError` where `total` gives some layer no weight.
    """
    rule = allocation.bound(share) if isinstance(share, str) else share
    weights = [rule(tuple(shape)) for shape in shapes.values()]
    sizes = [math.prod(shape) for shape in shapes.values()]
    if not len(shapes) <= total <= sum(sizes):
        allowed = f"{len(shapes)} (one a layer) to {sum(sizes)}"
        raise UsageError(f"`density` gives {total} active weights; allowed are {allowed}")
    counts = apportion(weights, total, 1, sizes)
    return dict(zip(shapes, counts, strict=True))


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> torch.Tensor:
    """Boolean CPU tensor with exactly `count` active positions, every such set equally likely."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask.view(-1)[random_k(count, ~mask, generator)] = True
    return mask
