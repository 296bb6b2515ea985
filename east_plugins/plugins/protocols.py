"""What a rule sees of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass
class Layer:
    """One maskable weight, offered to growth, prune and redistribution rules.

    `weight`, `mask` (bool, True is active) and `fired` (bool, active at least once so far) have the weight's
    shape. `grad` is the dense gradient of the loss and `momentum` its dense running average
    `m <- beta * m + grad`, kept for rules registered with `needs=("momentum",)`. `generator` is a CPU generator,
    the same on every rank, for rules that draw numbers of their own.
    """

    name: str
    weight: Tensor
    mask: Tensor
    fired: Tensor
    generator: torch.Generator
    dense_grad: Tensor | None = None
    dense_momentum: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """Dense gradient of the loss, all ranks averaged; raises `UsageError` where none was computed."""
        return self._require(self.dense_grad, "gradient: declare needs=('grad',), and step after backward()")

    @property
    def momentum(self) -> Tensor:
        """Dense running average of gradients; raises `UsageError` before the first step."""
        return self._require(self.dense_momentum, "momentum: declare needs=('momentum',)")

    def _require(self, tensor: Tensor | None, what: str) -> Tensor:
        if tensor is None:
            raise UsageError(f"layer {self.name} has no {what}")
        return tensor
