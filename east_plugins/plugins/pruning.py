"""Prune rules: the importance of every weight; the lowest is dropped first. Only active positions are compared.

An importance of `inf` says: do not replace this weight (the host then replaces fewer; the active count stays
exact).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .protocols import Layer, option
from .registry import pruning


@pruning.register("magnitude")
def magnitude(layer: Layer) -> Tensor:
    """Magnitude of the weight."""
    return layer.weight.abs()


@pruning.register("SET")
def smallest_of_each_sign(layer: Layer) -> Tensor:
    """The smallest positive and the largest negative weights, alternately (SET, Mocanu et al. 2018)."""
    importance = torch.zeros_like(layer.weight, dtype=torch.float32)
    for one_sign in (layer.mask & (layer.weight >= 0), layer.mask & (layer.weight < 0)):
        size = layer.weight[one_sign].abs()
        importance[one_sign] = size.argsort(stable=True).argsort().float()
    return importance


@pruning.register("threshold")
@dataclass(frozen=True)
class Threshold:
    """Magnitudes up to the threshold, and those alone: larger weights are not replaced (sparse_learning)."""

    threshold: float = option(0.001, "largest magnitude that is pruned", type=float)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UsageError(f"`threshold` must be at least 0, got {self.threshold}")

    def __call__(self, layer: Layer) -> Tensor:
        size = layer.weight.abs()
        return size.masked_fill(size > self.threshold, torch.inf)


@pruning.register("taylor", needs=("grad",))
@pruning.register("Taylor_FO", needs=("grad",))
def taylor(layer: Layer) -> Tensor:
    """First-order change of the loss, (weight * gradient)^2 (Molchanov et al. 2019; ITOP's Taylor_FO)."""
    return (layer.weight * layer.grad).square()


@pruning.register("random")
def random(layer: Layer) -> Tensor:
    """Any active weight, equally likely: all importances tie, the host draws."""
    return layer.weight.new_zeros(()).expand_as(layer.weight)
