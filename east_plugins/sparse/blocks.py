"""Taps over blocks of input channels (`blocks.c`): for layers whose inputs are each read by many taps."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import kernel

if TYPE_CHECKING:
    from .taps import TapConvolution


@dataclasses.dataclass(frozen=True)
class Taps:
    """Taps sorted by the channel they write, then by the one they read; int32.

    `begin` [channels + 1]: the first tap of each channel. `source`, `row`, `column` [taps]: the channel that is read,
    and how far from where the place that is written lies. `order` [taps]: where each has its weight; None for the same
    order.
    """

    begin: Tensor
    source: Tensor
    row: Tensor
    column: Tensor
    order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def channels(self) -> int:
        return len(self.begin) - 1


@dataclasses.dataclass(frozen=True)
class _Axis:
    """What a pass writes along one axis, and what it reads for it. Offsets are those of its taps, lowest to highest."""

    count: int
    first: int
    step: int
    size: int
    source_size: int
    stride: int
    lowest: int
    highest: int
    phases: int

    @classmethod
    def of(cls, offsets: Tensor, **sizes: int) -> _Axis:
        lowest, stride = int(offsets.min()), sizes["stride"]
        phases = sum(1 << phase for phase in set(((offsets - lowest) % stride).tolist()))
        return cls(**sizes, lowest=lowest, highest=int(offsets.max()), phases=phases)


class BlockConvolution:
    """The passes of a `TapConvolution` for one size of planes: forward, input gradient, weight gradient."""

    def __init__(self, taps: TapConvolution, height: int, width: int):
        axes = (*zip(taps.kernel_size, taps.stride, taps.padding, taps.dilation, strict=True),)
        geometry = taps.geometry(height, width)
        out = [geometry.rows.out, geometry.columns.out]
        self.shape = (taps.outputs, *out)
        self._forward = _Pass(*self._described(taps, axes, (height, width), out), taps.inputs)
        backward = list(self._described_backward(taps, axes, (height, width), out))
        self._backward = [_Pass(*each, taps.outputs) for each in backward]
        written = sum(rows.count * columns.count for _, (rows, columns) in backward)
        self._covered = written == height * width  # by the passes of the input gradient

    @staticmethod
    def _described(
        taps: TapConvolution, axes: tuple, sizes: tuple[int, int], out: list[int]
    ) -> tuple[Taps, list[_Axis]]:
        side = taps.by_output
        places = [
            place * dilation - padding
            for place, (_, _, padding, dilation) in zip((side.row, side.column), axes, strict=True)
        ]
        described = [
            _Axis.of(place, count=count, first=0, step=1, size=count, source_size=size, stride=stride)
            for place, (_, stride, _, _), size, count in zip(places, axes, sizes, out, strict=True)
        ]
        return Taps(side.begin, side.read, *places), described

    @staticmethod
    def _described_backward(
        taps: TapConvolution, axes: tuple, sizes: tuple[int, int], out: list[int]
    ) -> Iterator[tuple[Taps, list[_Axis]]]:
        """One pass for every remainder of a place by the stride: the taps that lead from it to a written place."""
        side, channels = taps.by_input, torch.repeat_interleave(torch.arange(taps.inputs), taps.by_input.begin.diff())
        for first in ((row, column) for row in range(axes[0][1]) for column in range(axes[1][1])):
            shifted = [
                at + padding - place * dilation
                for at, place, (_, _, padding, dilation) in zip(first, (side.row, side.column), axes, strict=True)
            ]
            leads = (shifted[0] % axes[0][1] == 0) & (shifted[1] % axes[1][1] == 0)
            if not bool(leads.any()) or any(at >= size for at, size in zip(first, sizes, strict=True)):
                continue
            places = [(place // axis[1])[leads].contiguous() for place, axis in zip(shifted, axes, strict=True)]
            begin = torch.bincount(channels[leads], minlength=taps.inputs).cumsum(0)
            begin = torch.cat([begin.new_zeros(1), begin]).int()
            described = [
                _Axis.of(
                    place, count=len(range(at, size, axis[1])), first=at, step=axis[1], size=size, source_size=read,
                    stride=1,
                )
                for place, at, axis, size, read in zip(places, first, axes, sizes, out, strict=True)
            ]  # fmt: skip
            yield Taps(begin, side.read[leads].contiguous(), *places, side.order[leads].contiguous()), described

    def convolve(self, x: Tensor, values: Tensor) -> Tensor:
        """[inputs, H, W, N] to [outputs, H', W', N]."""
        out = x.new_empty(*self.shape, x.shape[-1])
        self._forward.gather(values, x, out)
        return out

    def input_gradient(self, grad: Tensor, values: Tensor, like: Tensor) -> Tensor:
        grad_x = torch.empty_like(like) if self._covered else torch.zeros_like(like)
        for each in self._backward:
            each.gather(values, grad, grad_x)
        return grad_x

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Of every tap, in float64."""
        total = torch.empty(len(self._forward.taps), dtype=torch.float64)
        self._forward.products(grad, x, total)
        return total


class _Pass:
    """The functions of blocks.c for some taps that read so many channels, `sources`."""

    def __init__(self, taps: Taps, axes: list[_Axis], sources: int):
        self.taps, self._axes = taps, axes
        listed = (taps.begin, taps.source, taps.row, taps.column)
        self._given = (taps.channels, sources, *map(Tensor.data_ptr, listed))
        self._order = None if taps.order is None else taps.order.data_ptr()
        self._structs: dict[int, kernel.Pass] = {}

    def gather(self, values: Tensor, x: Tensor, out: Tensor) -> None:
        gather, _ = _functions(x.dtype)
        addresses = values.data_ptr(), x.data_ptr(), out.data_ptr()
        _raise(gather(self._struct(x), *self._given, self._order, *addresses))

    def products(self, grad: Tensor, x: Tensor, total: Tensor) -> None:
        _, products = _functions(x.dtype)
        _raise(products(self._struct(x), *self._given, grad.data_ptr(), x.data_ptr(), total.data_ptr()))

    def _struct(self, x: Tensor) -> Any:
        """Address of the description for planes with so many images."""
        images = x.shape[-1]
        if images not in self._structs:
            rows, columns = self._axes
            self._structs[images] = kernel.Pass(
                images, rows.count, columns.count, rows.first, columns.first, rows.step, columns.step,
                rows.size, columns.size, rows.source_size, columns.source_size, rows.stride, columns.stride,
                rows.lowest, rows.highest, columns.lowest, columns.highest, rows.phases, columns.phases,
            )  # fmt: skip
        return ctypes.byref(self._structs[images])


def _raise(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the copies of a sparse convolution")


@functools.cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    """`gather_blocks` and `weight_gradient_blocks`, which take addresses."""
    library = kernel.load(dtype)
    assert library is not None  # or a convolution would not have come here, see `taps.supported`
    gather, products = library.gather_blocks, library.weight_gradient_blocks
    shared = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 4]
    gather.argtypes, products.argtypes = [*shared, *[ctypes.c_void_p] * 4], [*shared, *[ctypes.c_void_p] * 3]
    return gather, products
