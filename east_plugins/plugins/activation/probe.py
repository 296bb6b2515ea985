"""Where a network calls ReLU or another activation, and which axis of the tensor there is that of the channels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...ops.modes import training_mode
from ...ops.substitute import spared_buffers

IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_, torch._C._nn.silu_, torch._C._nn.hardswish_}

#: The functions that compute each activation, and the one that does so for any tensor and not in place.
FUNCTIONS: dict[str, tuple[Callable, set[Callable]]] = {
    "relu": (F.relu, {F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu_}),
    "relu6": (F.relu6, {F.relu6}),
    "gelu": (F.gelu, {F.gelu}),
    "silu": (F.silu, {F.silu, torch._C._nn.silu, torch._C._nn.silu_}),
    "hardswish": (F.hardswish, {F.hardswish, torch._C._nn.hardswish, torch._C._nn.hardswish_}),
}

_LAST = {"linear", "layer_norm", "rms_norm", "multi_head_attention_forward", "embedding", "bilinear"}
_SECOND = {
    *(f"conv{transposed}{n}d" for n in "123" for transposed in ("", "_transpose")),
    *("batch_norm", "group_norm", "instance_norm"),
}


class Activation(NamedTuple):
    """A call of one of `FUNCTIONS`: its input, whether it works in place, and what computes the same out of place."""

    x: Tensor
    inplace: bool
    plain: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, func: Callable, args: tuple, kwargs: Mapping[str, Any], names: Collection[str]) -> Activation | None:
        """A call as such, where its activation is one of these names; `F.hardtanh` from 0 to 6 is ReLU6."""
        if func is F.hardtanh:
            given = {**dict(zip(("input", "min_val", "max_val", "inplace"), args, strict=False)), **kwargs}
            if "relu6" not in names or (given.get("min_val"), given.get("max_val")) != (0.0, 6.0):
                return None
            return cls(given["input"], bool(given.get("inplace")), F.relu6)
        plain = next((FUNCTIONS[name][0] for name in names if func in FUNCTIONS[name][1]), None)
        if plain is None:
            return None
        given = {**dict(zip(("input", "inplace"), args, strict=False)), **kwargs}
        inplace = func in IN_PLACE or bool(given.get("inplace"))
        if "approximate" in given:
            plain = functools.partial(plain, approximate=given["approximate"])
        return cls(given["input"], inplace, plain)


class Call(NamedTuple):
    """One call: its number of channels, and their axis, counted from the end where they come last."""

    channels: int
    axis: int


@torch.no_grad()
def calls_of(model: nn.Module, x: Tensor, names: Collection[str] = ("relu",)) -> dict[nn.Module, list[Call]]:
    """Every call of these activations on two dimensions or more in a forward pass in training mode, by the module that
    makes it.

    The model's parameters, buffers and modes are left as they were.
    """
    running: list[nn.Module] = []

    def leave(module, args, output):
        running.pop()

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(lambda module, args: running.append(module)))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        with training_mode(model, True), spared_buffers(model), _Probe(running, names) as probe:
            model(x)
    return probe.calls


class _Probe(TorchFunctionMode):
    """Follows the axis of channels from the layers and norms, which write it, to the activations."""

    def __init__(self, running: list[nn.Module], names: Collection[str]):
        super().__init__()
        self.running, self.names = running, names
        self.calls: dict[nn.Module, list[Call]] = {}
        self._axes: dict[int, tuple[Tensor, int]] = {}  # tensors are kept, so that no id is used twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = Activation.of(func, args, kwargs, self.names)
        if call is not None:
            x = call.x
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
