"""Whether a sparse network lets signals through: gradients to its weights, activations past its ReLUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..ops.maskable import maskable
from ..ops.modes import forked_rng, training_mode
from ..ops.substitute import spared_buffers

_RELU = {F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu_}


def gradient_norms(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, float]:
    """L2 norm of the loss's gradient over the active weights, for every masked weight; their sum is the gradient flow
    (EAST, Fig. 5).

    The pass is one of training: norms use the batch's statistics, and running ones stay as they are.
    """
    weights = {name: weight for name, weight in maskable(model).items() if name in masks}
    with training_mode(model, True), spared_buffers(model), forked_rng(x.device):
        gradients = torch.autograd.grad(loss(model(x), y), list(weights.values()))
    return {name: float((g * masks[name]).norm()) for name, g in zip(weights, gradients, strict=True)}


@torch.no_grad()
def positive_preactivations(model: nn.Module, x: Tensor) -> list[float]:
    """Share of positive numbers in the input of each ReLU call, in the order of a forward pass in evaluation mode
    (EAST, Fig. 3)."""
    with training_mode(model, False), _Watch() as watch:
        model(x)
    return watch.shares


class _Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.shares: list[float] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RELU:
            x = args[0] if args else kwargs["input"]
            self.shares.append(float((x > 0).double().mean()))
        return func(*args, **kwargs)
