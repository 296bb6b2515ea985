"""DyReLU's means over positions and larger of two lines, compiled for tensors in planes (see `taps`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..plugins.activation import dyrelu
from . import kernel
from .once import once
from .taps import images_first, in_planes, planes


def max_of_lines(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """As in `dyrelu`; one pass over memory, and one backward, where x is [N, C, H, W] in planes and the coefficients
    are one for each image (and channel)."""
    coefficients = (a1, b1, a2, b2)
    each_image = all(len(t) == len(x) and t.shape[-2:] == (1, 1) and t.dtype == x.dtype for t in coefficients)
    if each_image and _compiled(x):
        return _MaxOfLines.apply(x, *(t.expand(*x.shape[:2], 1, 1)[..., 0, 0] for t in coefficients))
    return dyrelu.max_of_lines(x, *coefficients)


def position_mean(x: Tensor) -> Tensor:
    """As in `dyrelu`."""
    return _PositionSums.apply(x) / x[0, 0].numel() if _compiled(x) else dyrelu.position_mean(x)


def _compiled(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in kernel.REAL and x.numel() > 0 and in_planes(x) and kernel.load(x.dtype) is not None


class _Sizes(ctypes.Structure):
    _fields_ = [("channels", ctypes.c_int), ("positions", ctypes.c_ssize_t), ("images", ctypes.c_ssize_t)]

    @classmethod
    def of(cls, x: Tensor):
        channels, height, width, images = x.shape
        return ctypes.byref(cls(channels, height * width, images))


class _PositionSums(torch.autograd.Function):
    """Of [N, C, H, W] in planes; [N, C]."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        x = planes(x)
        sums = x.new_empty(len(x), x.shape[3])
        kernel.load(x.dtype).position_sums(_Sizes.of(x), kernel.pointer(x), kernel.pointer(sums))
        return sums.T

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        return grad[..., None, None].expand(ctx.shape)


class _MaxOfLines(torch.autograd.Function):
    """Of [N, C, H, W] in planes and four coefficients [N, C]."""

    @staticmethod
    def forward(ctx, x: Tensor, *coefficients: Tensor) -> Tensor:
        x, coefficients = planes(x), [t.T.contiguous() for t in coefficients]
        y = torch.empty_like(x)
        kernel.load(x.dtype).lines_forward(_Sizes.of(x), *map(kernel.pointer, (x, *coefficients, y)))
        ctx.save_for_backward(x, *coefficients)
        return images_first(y)

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        x, *coefficients = ctx.saved_tensors
        grad, grad_x = planes(grad), torch.empty_like(x)
        found = [torch.empty_like(t) for t in coefficients]
        tensors = (x, *coefficients, grad, grad_x, *found)
        kernel.load(x.dtype).lines_backward(_Sizes.of(x), *map(kernel.pointer, tensors))
        return grad_x.permute(3, 0, 1, 2), *(t.T for t in found)
