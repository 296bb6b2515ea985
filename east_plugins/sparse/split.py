"""Activations of which only the touched channels are stored in full, for networks that read means of all channels.

While DyReLU is in its phase, the channels that no active weight touches are no constants of the network, but still
constants of an image: their value depends on the image alone, not on the position. One number an image stands for
them, and whatever reads all channels (the pooled context) is exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plugins.activation.dyrelu import lines_of_input, position_mean
from . import lines
from .fused import Pending, read

_POINTWISE = {
    "add", "radd", "sub", "rsub", "subtract", "mul", "rmul", "multiply", "div", "truediv", "divide", "neg", "abs",
    "maximum", "minimum", "relu", "leaky_relu", "relu6", "elu", "selu", "gelu", "silu", "mish", "hardswish", "sigmoid",
    "hardsigmoid", "tanh", "hardtanh", "softplus", "clamp", "clone", "lerp", "max_of_lines",
}  # fmt: skip
_POOLS = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d"}
_FLAT = {"flatten", "view", "reshape"}


@dataclass(frozen=True)
class Channels:
    """Which channels are stored in full, and which as one number an image; int64, ascending.

    `whole`: whether layers after flattening read all channels, and not the kept ones only.
    """

    kept: Tensor
    rest: Tensor
    whole: bool = False

    @classmethod
    def of(cls, kept: Tensor, count: int, device: torch.device, whole: bool = False) -> Channels:
        rest = torch.ones(count, dtype=torch.bool)
        rest[kept.cpu()] = False
        return cls(kept.to(device), rest.nonzero().squeeze(1).to(device), whole)

    @functools.cached_property
    def order(self) -> Tensor:
        """Where each channel is, among the kept and then the others."""
        return torch.cat([self.kept, self.rest]).argsort()

    @property
    def count(self) -> int:
        return len(self.kept) + len(self.rest)


class Split:
    """Stands for a tensor [N, C, H, W]: `kept` is [N, K, H, W], `rest` [N or 1, C - K, 1, 1].

    Operations that work element by element are done on both parts, with tensors of C channels divided alike. Others
    raise `NotImplementedError`, so that the engine falls back to all channels.
    """

    def __init__(self, kept: Tensor | Pending, rest: Tensor, channels: Channels):
        if rest.shape[2:] != (1, 1):
            raise NotImplementedError("a channel left out would depend on the position")
        self.unread, self.rest, self.channels = kept, rest, channels

    @property
    def kept(self) -> Tensor:
        self.unread = read(self.unread)
        return self.unread

    @kept.setter
    def kept(self, kept: Tensor) -> None:
        self.unread = kept

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, in_place = _name(func.__name__)
        split = next((operand for operand in args if isinstance(operand, Split)), None)
        if split is None:
            raise NotImplementedError(f"{name} of a list of activations with channels left out")
        in_place = kwargs.pop("inplace", False) or in_place
        if name in _POINTWISE:
            result = split._pointwise(getattr(torch, name) if in_place else func, args, kwargs)
            if in_place:
                split.kept, split.rest = result.kept, result.rest
            return split if in_place else result
        if name == "dynamic_relu":
            return split._dynamic_relu(*args[1:])
        if name == "position_mean":
            return split._mean()
        if name == "mean":
            return split._mean_over(*args[1:], **kwargs)
        if split.channels.whole and "max" in name and len(split.rest) > 1:
            raise NotImplementedError(f"{name}: of equal numbers one alone gets the gradient")
        if name in _POOLS and not kwargs.get("padding") and len(args) < 4:
            return Split(func(split.kept, *args[1:], **kwargs), split.rest, split.channels)
        if name in _FLAT:  # what follows are layers
            return func(split._all() if split.channels.whole else split.kept, *args[1:], **kwargs)
        raise NotImplementedError(f"{name} of activations with channels left out")

    def _pointwise(self, func, args, kwargs) -> Split:
        kept = func(*(self._part(operand, "kept") for operand in args), **kwargs)
        return Split(kept, func(*(self._part(operand, "rest") for operand in args), **kwargs), self.channels)

    def _part(self, operand: Any, part: str) -> Any:
        """An operand for one of the two parts: of C channels, or the same for all."""
        if isinstance(operand, Split):
            return getattr(operand, part)
        if isinstance(operand, Tensor) and operand.dim() >= 3 and operand.shape[-3] > 1:
            return operand.index_select(operand.dim() - 3, getattr(self.channels, part))
        return operand

    def _dynamic_relu(
        self, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor, beta: Tensor | None
    ) -> Split:
        layers = squeeze, squeeze_bias, excite, excite_bias
        if not lines.compiled(self.kept, layers, beta):
            return lines_of_input(self, *layers, beta)
        return Split(*lines.dynamic_relu(self.kept, self.rest, self.channels, layers, beta), self.channels)

    def _mean_over(self, dim=None, keepdim: bool = False) -> Tensor:
        """Means over positions, of all channels: [N, C], or [N, C, 1, 1] with `keepdim`."""
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        if not all(isinstance(d, int) for d in dims) or sorted(d % 4 for d in dims) != [2, 3]:
            raise NotImplementedError(f"mean over {dim} of activations with channels left out")
        return self._mean()[..., None, None] if keepdim else self._mean()

    def _mean(self) -> Tensor:
        means = torch.cat([position_mean(self.kept), self.rest[..., 0, 0].expand(len(self), -1)], 1)
        return means.index_select(1, self.channels.order)

    def _all(self) -> Tensor:
        rest = self.rest.expand(len(self), -1, *self.kept.shape[2:])
        return torch.cat([self.kept, rest], 1).index_select(1, self.channels.order)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.channels.count, *self.kept.shape[2:]))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def dtype(self) -> torch.dtype:
        return self.kept.dtype

    @property
    def device(self) -> torch.device:
        return self.kept.device

    def copy_(self, other: Split) -> Split:
        self.kept, self.rest = other.kept, other.rest
        return self


def _name(function: str) -> tuple[str, bool]:
    """`__iadd__` or `add_` as ("add", True), `__add__` or `add` as ("add", False)."""
    if function.startswith("__"):
        name = function.strip("_")
        in_place = name.startswith("i") and name[1:] in _POINTWISE
        return name[in_place:], in_place
    return function.rstrip("_"), function.endswith("_")


def _method(name: str):
    function = getattr(Tensor, name)
    return lambda self, *args, **kwargs: Split.__torch_function__(function, (), (self, *args), kwargs)


for _operator in ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "neg", "abs"):
    setattr(Split, f"__{_operator}__", _method(f"__{_operator}__"))
for _function in ("add", "add_", "mul", "mul_", "relu", "relu_", "clamp", "clone", "mean", *sorted(_FLAT)):
    setattr(Split, _function, _method(_function))
