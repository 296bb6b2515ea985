"""Batch norm of tensors whose images lie side by side in memory ("planes", see `taps`)."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernel
from .once import once
from .taps import images_first, in_planes, planes


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of a training batch [N, C, ...]; also its mean and unbiased variance [C], without gradients."""
    if in_planes(x) and x.device.type == "cpu" and x.dtype in kernel.REAL and kernel.load(x.dtype) is not None:
        y, mean, variance = _Normalise.apply(x, weight, bias, eps)
        count = x.numel() // x.shape[1]
        return y, mean.to(x.dtype), (variance * (count / max(1, count - 1))).to(x.dtype)
    mean, variance = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps), mean, variance


def normalise_with(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with given statistics, as in evaluation."""
    if not in_planes(x):
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        x = planes(x)
        y = torch.empty_like(x)
        mean, variance = torch.empty(2, len(x), dtype=torch.float64).unbind()
        tensors = [kernel.pointer(tensor) for tensor in (x, weight, bias, y, mean, variance)]
        kernel.load(x.dtype).norm_forward(*_sizes(x), *tensors[:3], ctypes.c_double(eps), *tensors[3:])
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.mark_non_differentiable(mean, variance)
        return images_first(y), mean, variance

    @staticmethod
    @once
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, variance = ctx.saved_tensors
        grad, grad_x = planes(grad), torch.empty_like(x)
        grad_weight = None if weight is None else torch.empty_like(weight)
        grad_bias = x.new_empty(len(x)) if ctx.has_bias else None
        before = [kernel.pointer(tensor) for tensor in (x, weight, mean, variance)]
        after = [kernel.pointer(tensor) for tensor in (grad, grad_x, grad_weight, grad_bias)]
        kernel.load(x.dtype).norm_backward(*_sizes(x), *before, ctypes.c_double(ctx.eps), *after)
        return grad_x.permute(3, 0, 1, 2), grad_weight, grad_bias, None


def _sizes(x: Tensor) -> tuple[ctypes.c_int, ctypes.c_ssize_t]:
    return ctypes.c_int(len(x)), ctypes.c_ssize_t(x[0].numel())
