"""Layers with the weight alpha D + S: a fixed DCT matrix and a trainable sparse one (Price and Tanner 2021)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ....ops.marks import Marked
from . import engines, transform
from .live import Live

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation

if TYPE_CHECKING:

    class _Layer(nn.Module):
        """What a DCT layer is mixed into."""

        weight: Tensor
        bias: Any

    class _Convolution(_ConvNd):
        """What a convolution's is mixed into."""

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

else:
    _Layer = _Convolution = object


class DCTLayer(Marked, _Layer):
    """What a DCT layer adds to the plain layer that it is: `weight` is S and starts at zero, `alpha` is a scalar.

    D is no parameter and no buffer: layers of equal shape use one tensor, made when it is first needed, and a state
    dict holds the plain layer's names and `alpha`.

    Args (besides those of the plain layer):
        alpha: the value that alpha starts at.
        trainable: whether alpha is a parameter; where not, it is a buffer.
        engine: how the product of input and weight is computed, see `engines`.
    """

    alpha: Tensor
    groups: int = 1
    channel_dim: int
    resting = 0  # calls left without a look at S, see engines.REST

    def __init__(self, *args, alpha: float = 1.0, trainable: bool = True, engine: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        self.add_offset(alpha, trainable, engine)

    def add_offset(self, alpha: float, trainable: bool, engine: str) -> None:
        """Make a plain layer, whose class was changed to this one, a DCT layer with S = 0."""
        self.engine = engines.check(engine)
        value = torch.full((), alpha, dtype=self.weight.dtype, device=self.weight.device)
        if trainable:
            self.alpha = nn.Parameter(value)
        else:
            self.register_buffer("alpha", value)
        nn.init.zeros_(self.weight)

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the layer forms alpha D + S and multiplies once."""
        before, self.engine = self.engine, "dense"
        try:
            yield
        finally:
            self.engine = before

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # the plain layer's
        nn.init.zeros_(self.weight)

    @property
    def fixed_numel(self) -> int:
        """Number of values of D, for costs: every layer's own, although layers of equal shape use one tensor."""
        return self.weight.numel()

    def matrix(self) -> Tensor:
        """D, of the weight's shape, dtype and device. Other layers use the same tensor: do not change it."""
        return transform.matrix(tuple(self.weight.shape), self.weight.dtype, self.weight.device)

    def effective_weight(self) -> Tensor:
        """alpha D + S."""
        return torch.addcmul(self.weight, self.matrix(), self.alpha)

    def forward(self, input: Tensor) -> Tensor:
        engine, live = engines.choose(self, input)
        if live is None:
            return self.product(input, self.effective_weight(), self.bias)
        output = self.fast_product(input, self.weight, self.alpha, engine, live)
        return output if self.bias is None else output + self.bias.reshape(-1, *[1] * (self.weight.dim() - 2))

    def fast_product(self, input: Tensor, weight: Tensor, alpha: Tensor, engine: str, live: Live) -> Tensor:
        """Product of `input` and alpha D + `weight`, of which only the `live` part is computed with."""
        input = self.padded(input)
        offset = alpha * self.dct(input, engine)
        if self.groups > 1:
            return offset + self.sparse_product(input, weight)
        return _AddLive.apply(self, offset, input, weight, live)

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of `input` and a dense weight, as the plain layer computes it."""
        raise NotImplementedError

    def sparse_product(self, input: Tensor, weight: Tensor) -> Tensor:
        """Product of a `padded` input and a dense weight."""
        raise NotImplementedError

    def padded(self, input: Tensor) -> Tensor:
        """The input, padded where it is not the product that pads."""
        raise NotImplementedError

    def dct(self, input: Tensor, engine: str = "fft") -> Tensor:
        """Product of the `padded` input and D in O(n log n)."""
        raise NotImplementedError

    def take(self, input: Tensor, live: Live) -> Tensor:
        """What the live columns multiply, as channels."""
        raise NotImplementedError

    def mix(self, input: Tensor, weight: Tensor) -> Tensor:
        """Product of the channels and `weight` at every position."""
        raise NotImplementedError

    def gradients(self, grad: Tensor, input: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor | None]:
        """Gradients of `sparse_product` to the input and the weight, None where not needed."""
        raise NotImplementedError


def is_dct(module: nn.Module) -> bool:
    """Whether a module is a DCT layer: ours, or the published code's, which holds D as a submodule called `dct`."""
    return isinstance(module, DCTLayer) or isinstance(module._modules.get("dct"), nn.Module)


class DCTLinear(DCTLayer, nn.Linear):
    """nn.Linear with the weight alpha D + S, see `DCTLayer`."""

    channel_dim = -1

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, weight, bias)

    def sparse_product(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)

    def padded(self, input: Tensor) -> Tensor:
        return input

    def dct(self, input: Tensor, engine: str = "fft") -> Tensor:
        """Product of `input` and D in O(n log n)."""
        return transform.dct(input, self.out_features)

    def take(self, input: Tensor, live: Live) -> Tensor:
        """What the live columns multiply, as channels."""
        return input.index_select(-1, live.channels)

    def mix(self, input: Tensor, weight: Tensor) -> Tensor:
        """Product of the channels and `weight` at every position."""
        return F.linear(input, weight)

    def gradients(self, grad: Tensor, input: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor | None]:
        """Gradients of `sparse_product` to the input and the weight, None where not needed."""
        return [
            grad @ weight if needed[0] else None,
            grad.flatten(0, -2).T @ input.flatten(0, -2) if needed[1] else None,
        ]


class _DCTConv(DCTLayer, _Convolution):
    channel_dim = 1

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._conv_forward(input, weight, bias)

    def padded(self, input: Tensor) -> Tensor:
        """The input, padded where it is not the convolution that pads."""
        if self.pads_itself:
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, self._reversed_padding_repeated_twice, mode=mode)

    @property
    def pads_itself(self) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    @property
    def geometry(self) -> Geometry:
        """Stride, padding of a `padded` input, dilation."""
        padding = (
            (0,) * len(self.kernel_size) if isinstance(self.padding, str) or not self.pads_itself else self.padding
        )
        return self.stride, padding, self.dilation

    def dct(self, input: Tensor, engine: str = "fft") -> Tensor:
        """Product of the `padded` input and D, by "fft" of every patch in O(n log n), or "separable"."""
        if engine == "fft":
            stride, padding, dilation = self.geometry
            patches = transform.patches(input, self.kernel_size, stride, padding, dilation, self.groups)
            spectra = transform.dct(patches, self.out_channels).unflatten(-1, (self.groups, -1))
            return spectra.diagonal(dim1=-3, dim2=-2).transpose(-1, -2).flatten(-2).movedim(-1, 1)
        pairs = transform.factors(tuple(self.weight.shape), self.weight.dtype, self.weight.device)
        first, second = (
            _convolution(_pointwise(input, channels, self.groups), taps, self.geometry, self.out_channels)
            for channels, taps in pairs
        )
        return first + second

    def sparse_product(self, input: Tensor, weight: Tensor) -> Tensor:
        return _convolution(input, weight, self.geometry, self.groups)

    def take(self, input: Tensor, live: Live) -> Tensor:
        """What the live columns multiply, as channels: the input channel of each, shifted by its tap."""
        stride, padding, dilation = self.geometry
        input = F.pad(input.index_select(1, live.channels), [p for p in reversed(padding) for _ in range(2)])
        parts = []
        for part, tap in zip(input.split(live.taps, 1), itertools.product(*map(range, self.kernel_size)), strict=True):
            window = [
                slice(t * d, n - (k - 1 - t) * d, s)
                for t, d, n, k, s in zip(tap, dilation, part.shape[2:], self.kernel_size, stride, strict=True)
            ]
            parts.append(part[(..., *window)])
        return torch.cat(parts, 1)

    def mix(self, input: Tensor, weight: Tensor) -> Tensor:
        """Product of the channels and `weight` at every position."""
        return _pointwise(input, weight.reshape(*weight.shape, *[1] * len(self.kernel_size)))

    def gradients(self, grad: Tensor, input: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor | None]:
        """Gradients of `sparse_product` to the input and the weight, None where not needed."""
        zeros = [0] * len(self.kernel_size)
        return torch.ops.aten.convolution_backward(
            grad, input, weight, None, *self.geometry, False, zeros, self.groups, [*needed, False]
        )[:2]


class DCTConv1d(_DCTConv, nn.Conv1d):
    """nn.Conv1d with the weight alpha D + S, see `DCTLayer`."""


class DCTConv2d(_DCTConv, nn.Conv2d):
    """nn.Conv2d with the weight alpha D + S, see `DCTLayer`."""


class DCTConv3d(_DCTConv, nn.Conv3d):
    """nn.Conv3d with the weight alpha D + S, see `DCTLayer`."""


def _convolution(input: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    stride, padding, dilation = geometry
    return torch.convolution(input, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


def _pointwise(input: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    ones, zeros = (1,) * (weight.dim() - 2), (0,) * (weight.dim() - 2)
    return _convolution(input, weight, (ones, zeros, ones), groups)


class _AddLive(torch.autograd.Function):
    """`offset`, to which the product of `input` and `weight` is added, both passes computing with the live part only.

    The gradient to the weight is that to all of it: weights that are zero grow by it.
    """

    @staticmethod
    def forward(ctx, layer, offset, input, weight, live):
        ctx.layer, ctx.live = layer, live
        ctx.save_for_backward(input, weight)
        ctx.mark_dirty(offset)
        return offset.index_add_(layer.channel_dim, live.rows, layer.mix(layer.take(input, live), live.weight))

    @staticmethod
    def backward(ctx, grad):
        layer, live, (input, weight) = ctx.layer, ctx.live, ctx.saved_tensors
        _, _, to_input, to_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, grad, *layer.gradients(grad, input, weight, [to_input, to_weight]), None
        input_grad, weight_grad = layer.gradients(grad, input, weight, [False, to_weight])
        if to_input:
            with torch.enable_grad():
                leaf = input.detach().requires_grad_()
                taken = layer.take(leaf, live)
            part = layer.mix(grad.index_select(layer.channel_dim, live.rows), live.weight.T)
            (input_grad,) = torch.autograd.grad(taken, leaf, part)
        return None, grad, input_grad, weight_grad, None
