"""Functions of the sparse_learning signature, used as rules.

    growth:          (masking, name, new_mask, total_regrowth, weight) -> new_mask
    pruning:         (masking, mask, weight, name) -> new_mask
    redistribution:  (masking, name, weight, mask) -> number

They get our host in place of theirs (`masks`, `name2nonzeros`, `name2zeros`, `prune_rate`, `name2prune_rate`,
`get_momentum_for_weight`, `get_gradient_for_weights` are there). What they return is used as a score, so that the
host's exact counts hold for them too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..plugins.protocols import Layer

_LEGACY_PARAMETERS = {"growth": 5, "pruning": 4, "redistribution": 4}


def is_legacy(kind: str, function: Callable) -> bool:
    """Whether the function has the old signature of that kind: as many parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty for p in parameters) == _LEGACY_PARAMETERS.get(kind)


def adapt(kind: str, function: Callable, host: Any) -> Callable[[Layer, int], Tensor]:
    """A rule `(layer, count) -> score` around an old function; `count` is the number to be grown."""

    def grow(layer: Layer, count: int) -> Tensor:
        grown = function(host, layer.name, layer.mask.clone(), count, _weight(layer, host))
        return (grown.bool() & ~layer.mask).float()

    def prune(layer: Layer, count: int) -> Tensor:
        return function(host, layer.mask.clone(), _weight(layer, host), layer.name).bool().float()

    def redistribute(layer: Layer, count: int) -> Tensor:
        return function(host, layer.name, _weight(layer, host), layer.mask)

    return {"growth": grow, "pruning": prune, "redistribution": redistribute}[kind]


def _weight(layer: Layer, host: Any) -> Tensor:
    """The parameter; of a block, which is none of its own, its values."""
    return host.weights.get(layer.name, layer.weight)
