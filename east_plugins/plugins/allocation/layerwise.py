"""Allocations: how a global number of active weights is split over layers.

A rule returns each layer's weight in the split; `budgets` makes integers of it that sum exactly, no layer under 1
weight or over its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import UsageError
from ...ops.counts import apportion
from ...ops.select import random_k
from ..protocols import LayerShare, option
from ..registry import allocation
from .position import Place


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


@allocation.register("ERK-floor", counts=True)
@dataclass(frozen=True)
class ERKFloor:
    """ERK cut at 1 and at a floor, nothing given back, as the authors' code of EAST has it: the total is not exact.

    A layer's density is ERK's share of the total, at least the floor and at most 1. At the start counts are rounded;
    in later updates there is no floor and counts are cut to whole numbers (ES2, `sparselearning/core.py`).
    """

    floor: float = option(0.01, "least density of a layer at the start, as a share of the network's", type=float)
    least: float = option(0.0, "least density of a layer at the start", type=float)

    def __post_init__(self) -> None:
        for name in ("floor", "least"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"`{name}` must be in [0, 1], got {getattr(self, name)}")

    def __call__(self, shapes: Mapping[str, Sequence[int]], wanted: float, start: bool) -> dict[str, int]:
        size = sum(math.prod(shape) for shape in shapes.values())
        floor = max(self.floor * wanted / size, self.least) if start else 0.0
        share = int(wanted) / sum(map(sum, shapes.values()))
        densities = {name: share * (sum(shape) / math.prod(shape)) for name, shape in shapes.items()}
        whole = round if start else int
        return {name: whole(min(max(d, floor), 1.0) * math.prod(shapes[name])) for name, d in densities.items()}


def budgets(
    share: str | LayerShare,
    shapes: Mapping[str, Sequence[int]],
    total: int,
    places: Mapping[str, Place] | None = None,
) -> dict[str, int]:
    """Active weights of every layer under an allocation, or one of that name: integers that sum to `total`.

    `places` are the layers' positions, for an allocation that goes by them in place of their shapes. Raises
    `UnknownNameError`, or `UsageError` where `total` gives some layer no weight.
    """
    rule = allocation.bound(share) if isinstance(share, str) else share
    seen: Mapping[str, Any] = {name: tuple(shape) for name, shape in shapes.items()} if places is None else places
    weights = [rule(seen[name]) for name in shapes]
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
