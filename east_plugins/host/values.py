"""Initial values of active weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.maskable import output_of


@torch.no_grad()
def sparse_fan_in(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    generator: torch.Generator,
    modules: Mapping[str, nn.Module] = {},
) -> None:
    """Redraw the active weights, in place, from N(0, 2 / n), n the active weights that feed the same output neuron
    (Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win); others become 0.

    `modules` are the weights' layers: those of transposed convolutions have their inputs in front.

    Values are drawn on the CPU in the order of `masks`, so that every device gets the same ones.
    """
    for name, mask in masks.items():
        weight = weights[name]
        active = mask.nonzero(as_tuple=True)
        outputs = output_of(modules.get(name), active)
        fan_in = torch.bincount(outputs)[outputs]
        values = torch.randn(len(fan_in), generator=generator, dtype=torch.float64)
        weight.zero_()[active] = (values.to(weight.device) * (2 / fan_in).sqrt()).to(weight.dtype)
