"""Redistribution rules: each layer's share of the weights grown in one update, as a number >= 0.

`none` is no rule here: every layer keeps the budget that the allocation gave it.
"""

from __future__ import annotations

from torch import Tensor

from ..layer import Layer
from ..registry import redistribution


@redistribution.register("magnitude")
def magnitude(layer: Layer) -> Tensor:
    """Mean magnitude of the layer's active weights."""
    return layer.weight[layer.mask].abs().mean()


@redistribution.register("nonzeros")
def nonzeros(layer: Layer) -> Tensor:
    """Number of the layer's active weights."""
    return layer.mask.sum()


@redistribution.register("momentum", needs=("momentum",))
def momentum(layer: Layer) -> Tensor:
    """Mean |momentum| of the layer's active weights (SNFS, Dettmers and Zettlemoyer 2019)."""
    return layer.momentum[layer.mask].abs().mean()
