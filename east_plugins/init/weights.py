"""Initial values of active weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def sparse_fan_in(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Redraw the active weights, in place, from N(0, 2 / n), n the active weights that feed the same output neuron
    (Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win); others become 0.

    Values are drawn on the CPU in the order of `masks`, so that every device gets the same ones.
    """
    for name, mask in masks.items():
        weight = weights[name]
        active = mask.nonzero(as_tuple=True)
        fan_in = mask.flatten(1).sum(1)[active[0]]
        values = torch.randn(len(fan_in), generator=generator, dtype=torch.float64)
        weight.zero_()[active] = (values.to(weight.device) * (2 / fan_in).sqrt()).to(weight.dtype)
