"""Convolution as a sum over active weights ("taps"), on tensors whose images lie side by side in memory.

Such a tensor of logical shape [N, C, H, W] lies in memory as [C, H, W, N] ("planes"): every tap is then a run of
multiply-adds on neighbouring numbers for any stride and padding, and PyTorch's elementwise operations keep the layout.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import kernel
from .blocks import BlockConvolution
from .once import once


def planes(x: Tensor) -> Tensor:
    """[N, C, H, W] as contiguous [C, H, W, N]; a view where it lies so already."""
    return x.permute(1, 2, 3, 0).contiguous()


def images_first(x: Tensor) -> Tensor:
    """Contiguous [C, H, W, N] as [N, C, H, W] in the same memory, and no view: it can be written to in place."""
    channels, height, width, images = x.shape
    strides = (1, height * width * images, width * images, images)
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (images, channels, height, width), strides)


def in_planes(x: Tensor) -> bool:
    return x.dim() == 4 and x.permute(1, 2, 3, 0).is_contiguous()


def supported(module: nn.Module, x: Tensor) -> bool:
    """Whether `TapConvolution` can stand in for the module on this input."""
    return (
        isinstance(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and x.device.type == "cpu"
        and x.dim() == 4
        and module.weight.dtype in kernel.REAL
        and kernel.load(module.weight.dtype) is not None
    )


#: Taps a channel from which on `blocks` is faster: measured on ResNet-34's layers at density 0.001, 0.003 and 0.01.
MANY = 7


class TapConvolution:
    """The taps of one convolution in compact channel numbers, planned once for a mask.

    Args:
        module: the nn.Conv2d that stride, padding, dilation and kernel size are taken from.
        target, source, row, column: output channel, input channel, and place in the kernel of every active weight,
            in the order of the output channels; integer tensors [taps].
        outputs, inputs: numbers of compact channels.
    """

    def __init__(
        self, module: nn.Conv2d, target: Tensor, source: Tensor, row: Tensor, column: Tensor, outputs: int, inputs: int
    ):
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.kernel_size = module.kernel_size
        self.outputs, self.inputs = outputs, inputs
        self.target, self.source, self.row, self.column = (t.int() for t in (target, source, row, column))
        self.by_output = _Side(self.target, outputs, self.source, self.row, self.column, None)
        order = torch.argsort(source, stable=True)
        sorted_taps = (t[order].contiguous() for t in (self.source, self.target, self.row, self.column))
        key, read, row, column = sorted_taps
        self.by_input = _Side(key, inputs, read, row, column, order.int())
        self._passes: dict[tuple[int, int], BlockConvolution | RowConvolution] = {}

    def __call__(self, x: Tensor, values: Tensor) -> Tensor:
        """[N, inputs, H, W] and the active values [taps] to [N, outputs, H', W'], both differentiable."""
        return _Convolve.apply(x.to(values.dtype), values, self)

    def passes(self, height: int, width: int) -> BlockConvolution | RowConvolution:
        """The passes for one size of planes: by blocks of channels, where each channel is read by so many taps that
        copying it pays."""
        if (height, width) not in self._passes:
            few = len(self.target) < max(1, MANY * max(self.inputs, self.outputs)) or max(self.stride) > 30
            self._passes[height, width] = (RowConvolution if few else BlockConvolution)(self, height, width)
        return self._passes[height, width]

    def geometry(self, height: int, width: int) -> _Geometry:
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return _Geometry(*(_Axis(*size) for size in sizes))


class _Side:
    """Taps sorted by the channel they write: those of channel c are begin[c] to begin[c + 1]."""

    def __init__(self, key, channels, read, row, column, order):
        counts = torch.bincount(key, minlength=channels)
        self.begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        self.channels, self.most = channels, int(counts.max()) if len(key) else 0
        self.read, self.row, self.column, self.order = read, row, column, order


class _Axis:
    """Sizes of one axis, and which place is read for a place that is written: int32 [kernel, written], -1 for none."""

    def __init__(self, size: int, kernel: int, stride: int, padding: int, dilation: int):
        self.size, self.kernel = size, kernel
        self.out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        self.forward, self.backward = _places(size, self.out, kernel, stride, padding, dilation)


@functools.cache
def _places(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[Tensor, Tensor]:
    offset = torch.arange(kernel)[:, None] * dilation - padding
    read = torch.arange(out) * stride + offset
    forward = torch.where((read >= 0) & (read < size), read, -1)
    shifted = torch.arange(size) - offset
    inside = (shifted >= 0) & (shifted % stride == 0) & (shifted // stride < out)
    return forward.int(), torch.where(inside, shifted // stride, -1).int()


class _Geometry:
    def __init__(self, rows: _Axis, columns: _Axis):
        self.rows, self.columns = rows, columns

    def struct(self, images: int, most: int, backward: bool = False) -> kernel.Geometry:
        rows, columns = self.rows, self.columns
        out, source = (rows.out, columns.out), (rows.size, columns.size)
        written, read = (source, out) if backward else (out, source)
        tables = (rows.backward, columns.backward) if backward else (rows.forward, columns.forward)
        pointers = map(Tensor.data_ptr, tables)
        return kernel.Geometry(images, *written, *read, rows.kernel, columns.kernel, most, *pointers)


class RowConvolution:
    """The passes of a `TapConvolution` for one size of planes, row by row of what is written (`taps.c`)."""

    def __init__(self, taps: TapConvolution, height: int, width: int):
        geometry = taps.geometry(height, width)
        self._taps, self._geometry, self._sides = taps, geometry, (_side(taps.by_output), _side(taps.by_input))
        self._listed = tuple(map(kernel.pointer, (taps.target, taps.source, taps.row, taps.column)))
        self._structs: dict[tuple[int, int, bool], Any] = {}
        self.shape = taps.outputs, geometry.rows.out, geometry.columns.out

    def convolve(self, x: Tensor, values: Tensor) -> Tensor:
        """[inputs, H, W, N] to [outputs, H', W', N]."""
        out = x.new_empty(*self.shape, x.shape[3])
        self._gather(False, values, x, out)
        return out

    def input_gradient(self, grad: Tensor, values: Tensor, like: Tensor) -> Tensor:
        grad_x = torch.empty_like(like)
        self._gather(True, values, grad, grad_x)
        return grad_x

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Of every tap, in float64."""
        total = torch.empty(len(self._taps.target), dtype=torch.float64)
        struct = self._struct(x.shape[3], 0)
        tensors = map(kernel.pointer, (grad, x, total))
        kernel.load(x.dtype).weight_gradient(struct, len(total), *self._listed, *tensors)
        return total

    def _gather(self, backward: bool, values: Tensor, x: Tensor, out: Tensor) -> None:
        side = self._taps.by_input if backward else self._taps.by_output
        struct = self._struct(x.shape[3], side.most, backward)
        tensors = map(kernel.pointer, (values, x, out))
        kernel.load(x.dtype).gather(struct, side.channels, *self._sides[backward], *tensors)

    def _struct(self, images: int, most: int, backward: bool = False) -> Any:
        key = images, most, backward
        if key not in self._structs:
            self._structs[key] = ctypes.byref(self._geometry.struct(images, most, backward))
        return self._structs[key]


def _side(side: _Side) -> tuple[ctypes.c_void_p, ...]:
    return tuple(map(kernel.pointer, (side.begin, side.read, side.row, side.column, side.order)))


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, taps: TapConvolution) -> Tensor:
        x, values = planes(x), values.contiguous()
        ctx.save_for_backward(x, values)
        ctx.passes = taps.passes(*x.shape[1:3])
        return images_first(ctx.passes.convolve(x, values))

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        x, values = ctx.saved_tensors
        grad, grad_x, grad_values = planes(grad), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.passes.input_gradient(grad, values, x).permute(3, 0, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_values = ctx.passes.weight_gradient(grad, x).to(values.dtype)
        return grad_x, grad_values, None
