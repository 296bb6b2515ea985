"""What DyReLU computes of its input: means over positions, and the larger of two lines; compiled where images lie side
by side in memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import kernel
from .taps import in_planes, planes


def max_of_lines(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """`max(a1 x + b1, a2 x + b2)`, element by element, for coefficients that broadcast against x.

    Where x is [N, C, H, W] in planes (see `taps`) and the coefficients are one for each image (and channel), it is
    one pass over memory, and two backward.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(max_of_lines, (x,), x, a1, b1, a2, b2)
    coefficients = (a1, b1, a2, b2)
    if all(t.shape[-2:] == (1, 1) and t.dtype == x.dtype for t in coefficients) and _compiled(x):
        return _MaxOfLines.apply(x, *(t.expand(*x.shape[:2], 1, 1)[..., 0, 0] for t in coefficients))
    return torch.maximum(a1 * x + b1, a2 * x + b2)


def position_mean(x: Tensor) -> Tensor:
    """Means of [N, C, ...] over positions; [N, C]."""
    if has_torch_function_unary(x):
        return handle_torch_function(position_mean, (x,), x)
    count = x[0, 0].numel()
    # a sum's gradient is a view, a mean's a tensor of the input's size
    sums = _PositionSums.apply(x) if _compiled(x) else x.sum(tuple(range(2, x.dim())))
    return sums / count


def _compiled(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype in kernel.REAL
        and in_planes(x)
        and not x.is_contiguous()  # it came from the engine
        and kernel.load(x.dtype) is not None
    )


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
    @torch.autograd.function.once_differentiable
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
        return y.permute(3, 0, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, *coefficients = ctx.saved_tensors
        grad, grad_x = planes(grad), torch.empty_like(x)
        found = [torch.empty_like(t) for t in coefficients]
        tensors = (x, *coefficients, grad, grad_x, *found)
        kernel.load(x.dtype).lines_backward(_Sizes.of(x), *map(kernel.pointer, tensors))
        return grad_x.permute(3, 0, 1, 2), *(t.T for t in found)
