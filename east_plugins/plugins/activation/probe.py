"""Where a network calls ReLU, and which axis of the tensor there is that of the channels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...ops.modes import training_mode
from ...ops.substitute import spared_buffers

IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_}
RELU = {F.relu, torch.relu, Tensor.relu} | IN_PLACE

_LAST = {"linear", "layer_norm", "rms_norm", "multi_head_attention_forward", "embedding", "bilinear"}
_SECOND = {
    *(f"conv{transposed}{n}d" for n in "123" for transposed in ("", "_transpose")),
    *("batch_norm", "group_norm", "instance_norm"),
}


class Call(NamedTuple):
    """One ReLU call: its number of channels, and their axis, counted from the end where they come last."""

    channels: int
    axis: int


@torch.no_grad()
def relu_calls(model: nn.Module, x: Tensor) -> dict[nn.Module, list[Call]]:
    """Every ReLU call on two dimensions or more in a forward pass in training mode, by the module that makes it.

    The model's parameters, buffers and modes are left as they were.
    """
    running: list[nn.Module] = []

    def leave(module, args, output):
        running.pop()

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(lambda module, args: running.append(module)))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        with training_mode(model, True), spared_buffers(model), _Probe(running) as probe:
            model(x)
    return probe.calls


class _Probe(TorchFunctionMode):
    """Follows the axis of channels from the layers and norms, which write it, to the ReLUs."""

    def __init__(self, running: list[nn.Module]):
        super().__init__()
        self.running = running
        self.calls: dict[nn.Module, list[Call]] = {}
        self._axes: dict[int, tuple[Tensor, int]] = {}  # tensors are kept, so that no id is used twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RELU:
            x, _ = arguments(func, *args, **kwargs)
            if x.dim() >= 2:
                axis = self._axis(x)
                last = axis == x.dim() - 1 and x.dim() > 2
                self.calls.setdefault(self.running[-1], []).append(Call(x.shape[axis], -1 if last else axis))
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [(operand, self._axes[id(operand)][1]) for operand in operands if id(operand) in self._axes]
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                found = self._written(getattr(func, "__name__", ""), known, tensor, args, kwargs)
                if found is not None:
                    self._axes[id(tensor)] = tensor, found
        return result

    def _axis(self, x: Tensor) -> int:
        return self._axes.get(id(x), (x, 1))[1]

    @staticmethod
    def _written(
        name: str, known: Sequence[tuple[Tensor, int]], result: Tensor, args: tuple, kwargs: Any
    ) -> int | None:
        name = name.strip("_")
        if name in _LAST:
            return result.dim() - 1
        if name in _SECOND:
            return 1
        if not known:
            return None
        operand, axis = known[0]
        if name in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "t", "T"):
            return _moved(name, operand, axis, args, kwargs)
        same = [axis for operand, axis in known if operand.shape == result.shape]
        if same:
            return same[0]
        if result.dim() == operand.dim() and result.shape[axis] >= operand.shape[axis]:
            return axis  # a pool, a slice of other axes, a concatenation
        channels = operand.shape[axis]
        if axis == operand.dim() - 1 and result.shape[-1] == channels:  # rows are joined or taken apart
            return result.dim() - 1
        return 1 if result.shape[1] == channels else None


def _moved(name: str, operand: Tensor, axis: int, args: tuple, kwargs: Any) -> int:
    """Where an axis is after a permutation: the one whose stride in a marked tensor stays."""
    marked = torch.empty_strided(operand.shape, [0] * operand.dim(), device="meta")
    marked = marked.as_strided(operand.shape, [int(i == axis) for i in range(operand.dim())])
    with torch._C.DisableTorchFunction():
        moved = getattr(torch.Tensor, name)
        moved = moved.__get__(marked) if name in ("T", "mT") else moved(marked, *args[1:], **kwargs)
    return moved.stride().index(1)


def arguments(func: Callable, input: Tensor, inplace: bool = False) -> tuple[Tensor, bool]:
    """A ReLU call's input, and whether it works in place."""
    return input, inplace or func in IN_PLACE
