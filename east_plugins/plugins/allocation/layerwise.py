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


def budgets(
    name: str, shapes: Mapping[str, Sequence[int]], total: int, places: Mapping[str, Place] | None = None
) -> dict[str, int]:
    """Active weights of every layer under the allocation called `name`: integers that sum to `total`.

    `places` are the layers' positions, for an allocation that goes by them. Raises `UnknownNameError`, or `UsageError`
    where `total` gives some layer no weight, or positions are needed and None.
    """
    entry = allocation.entry(name)
    if not entry.meta.get("places"):
        weights = [entry.object(tuple(shape)) for shape in shapes.values()]
    elif places is not None:
        weights = [entry.object(places[layer]) for layer in shapes]
    else:
        raise UsageError(f"--sparse-init {name} needs the layers' positions: add_module(..., input_shape=...)")
    sizes = [math.prod(shape) for shape in shapes.values()]
    if not len(shapes) <= total <= sum(sizes):
        allowed = f"{len(shapes)} (one a layer) to {sum(sizes)}"
        raise UsageError(f"--density gives {total} active weights; allowed are {allowed}")
    counts = apportion(weights, total, 1, sizes)
    return dict(zip(shapes, counts, strict=True))


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> torch.Tensor:
    """Boolean CPU tensor with exactly `count` active positions, every such set equally likely."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask.view(-1)[random_k(count, ~mask, generator)] = True
    return mask
