"""Whether a sparse network lets signals through: gradients to its weights, activations past its ReLUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .maskable import maskable
from .modes import forked_rng, training_mode
from .substitute import spared_buffers

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
def positive_preactivations(model: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...] = ()) -> list[float]:
    """Share of positive numbers in the input of each ReLU call, in the order of a forward pass in evaluation mode
    (EAST, Fig. 3). Modules of `kinds` stand in for a ReLU: they count by their input, and no call inside of them does.
    """
    watch = _Watch()
    with training_mode(model, False), watch, contextlib.ExitStack() as hooks:
        for module in model.modules() if kinds else ():
            if isinstance(module, kinds):
                hooks.callback(module.register_forward_pre_hook(watch.enter).remove)
                hooks.callback(module.register_forward_hook(watch.leave, always_call=True).remove)
        model(x)
    return watch.shares


class _Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.shares: list[float] = []
        self.inside = 0

    def enter(self, module: nn.Module, args: tuple) -> None:
        if not self.inside:
            self._count(args[0])
        self.inside += 1

    def leave(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.inside -= 1

    def _count(self, x: Tensor) -> None:
        self.shares.append(float((x > 0).double().mean()))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RELU and not self.inside:
            self._count(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)
