"""Batch norm of tensors whose images lie side by side in memory ("planes", see `taps`), by `norm.c`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernel
from .taps import in_planes


def supported(x: Tensor) -> bool:
    """Whether `Norm` takes this input [N, C, H, W] once it lies in planes."""
    return x.is_cpu and x.dtype in kernel.REAL and kernel.load(x.dtype) is not None


def compiled(x: Tensor) -> bool:
    """Whether `Norm` takes this input as it is."""
    return in_planes(x) and supported(x)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of a training batch [N, C, ...]; also its mean and unbiased variance [C], without gradients."""
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


class _Struct(ctypes.Structure):
    """`Norm` of norm.c."""

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("channels", "n", "size", "each")),
        *((name, ctypes.c_void_p) for name in ("at", "weight", "bias", "running_mean", "running_var")),
        ("eps", ctypes.c_double),
        ("share", ctypes.c_double),
        ("relu", ctypes.c_int),
    ]


class Norm:
    """The passes of a norm over channels in planes [C, H, W, N], with what may follow: y = relu(norm(x) + residual).

    Args:
        weight, bias: of all channels of the module, or None.
        channels: which of them the planes have; int64. None for all.
        share: of this batch in the module's running statistics, which are moved; None where they are not.
        each: for channels that are constants of an image, how many numbers each of theirs stands for; the statistics
            of the other channels were moved before.
    """

    def __init__(
        self, module: _BatchNorm, weight: Tensor | None, bias: Tensor | None, channels: Tensor | None,
        share: float | None, relu: bool, each: int | None = None,
    ):  # fmt: skip
        self.weight, self.bias, self.relu = weight, bias, relu
        self._moved = [] if share is None else [module.running_mean, module.running_var, module.num_batches_tracked]
        at, of_weight, of_bias, *running = map(_address, (channels, weight, bias, *(self._moved or (None, None))))
        self._counted = bool(self._moved) and each is None
        size = 0 if each else module.num_features
        self._struct = _Struct(
            0, 0, size, each or 1, at, of_weight, of_bias, *running[:2], module.eps, share or 0.0, relu
        )

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result, [N, C, H, W] in planes, and float64 [2, C]: mean and biased variance of x."""
        channels, height, width, images = x.shape
        positions = height * width * images
        y = x.new_empty_strided((images, channels, height, width), (1, positions, width * images, images))
        found = torch.empty(2, channels, dtype=torch.float64)
        self._struct.channels, self._struct.n = channels, positions
        forward, _ = _functions(x.dtype)
        forward(ctypes.byref(self._struct), *map(_address, (x, residual, y, found)))
        if self._counted:
            self._moved[2].add_(1)
        if self._moved:
            torch.autograd.graph.increment_version(self._moved[:2])
        return y, found

    def backward(
        self, x: Tensor, y: Tensor | None, found: Tensor, grad: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, and where they are wanted of the weight, bias and residual. `y` is needed for a ReLU."""
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = (
            torch.zeros_like(of) if of is not None and each else None
            for of, each in zip((self.weight, self.bias), wanted[:2], strict=True)
        )
        passed = torch.empty_like(x) if wanted[2] and self.relu else None
        tensors = (x, y, found, grad, grad_x, passed, grad_weight, grad_bias)
        _, backward = _functions(x.dtype)
        backward(ctypes.byref(self._struct), *map(_address, tensors))
        return grad_x, grad_weight, grad_bias, grad if wanted[2] and passed is None else passed


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    """`norm_forward` and `norm_backward`, which take the struct and addresses."""
    library = kernel.load(dtype)
    assert library is not None  # or it would not have come here, see `compiled`
    library.norm_forward.argtypes, library.norm_backward.argtypes = [ctypes.c_void_p] * 5, [ctypes.c_void_p] * 9
    return library.norm_forward, library.norm_backward
