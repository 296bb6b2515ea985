"""Redistribution rules: each layer's share of the weights grown in one update, as a number >= 0.

`none` is no rule here: every layer keeps the budget that the allocation gave it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocols import Layer
from .registry import redistribution


@redistribution.register("magnitude")
def magnitude(layer: Layer) -> Tensor:
    """Mean magnitude of the layer's active weights."""
    return _active_mean(layer.weight.abs(), layer.mask)


@redistribution.register("nonzeros")
def nonzeros(layer: Layer) -> Tensor:
    """Number of the layer's active weights."""
    return layer.mask.sum()


@redistribution.register("momentum", needs=("momentum",))
def momentum(layer: Layer) -> Tensor:
    """Mean |momentum| of the layer's active weights (SNFS, Dettmers and Zettlemoyer 2019)."""
    return _active_mean(layer.momentum.abs(), layer.mask)


def _active_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Without asking the device how many are active."""
    return torch.where(mask, values, 0).sum() / mask.sum()
