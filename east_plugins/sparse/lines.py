"""DyReLU as one node of autograd, for activations of which a part of the channels is stored in full (see `split`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernel
from .once import once
from .taps import images_first, planes

if TYPE_CHECKING:
    from .split import Channels

LINES = 4  # numbers of an image and channel: two slopes and two shifts


def compiled(kept: Tensor, parameters: Sequence[Tensor], beta: Tensor | None) -> bool:
    """Whether `dynamic_relu` takes these."""
    return (
        kept.is_cpu
        and kept.dtype in kernel.REAL
        and kept.numel() > 0
        and all(parameter.dtype == kept.dtype for parameter in parameters)
        and not (beta is not None and beta.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and kernel.load(kept.dtype) is not None
    )


def dynamic_relu(
    kept: Tensor, rest: Tensor, channels: Channels, parameters: Sequence[Tensor], beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As in `dyrelu`, of channels kept [N, K, H, W] and of the others, [N or 1, C - K, 1, 1]; [N, C - K, 1, 1].

    `parameters`: weight and bias of both layers.
    """
    return _DynamicReLU.apply(kept, rest, *parameters, channels, 1.0 if beta is None else float(beta))


class _Sizes(ctypes.Structure):
    """`Sizes` of lines.c."""

    _fields_ = [
        ("channels", ctypes.c_int),
        *((name, ctypes.c_ssize_t) for name in ("positions", "images", "all")),
        ("at", ctypes.c_void_p),
        ("beta", ctypes.c_double),
    ]


class _Part:
    """What the kernels do with some of the channels: x is [channels, positions, images]; `at` says which they are."""

    def __init__(self, x: Tensor, at: Tensor, count: int, beta: float):
        self.x, self._at, self._library = x, at, kernel.load(x.dtype)
        self._sizes = ctypes.byref(_Sizes(len(x), x[0].numel() // x.shape[-1], x.shape[-1], count, at.data_ptr(), beta))

    def means(self, of_all: Tensor) -> None:
        """Into [C, N]."""
        self._library.position_means(self._sizes, *map(kernel.pointer, (self.x, of_all)))

    def means_backward(self, grad_means: Tensor, grad_x: Tensor) -> None:
        self._library.position_means_backward(self._sizes, *map(kernel.pointer, (grad_means, grad_x)))

    def forward(self, lines: Tensor) -> Tensor:
        y = torch.empty_like(self.x)
        self._library.lines_forward(self._sizes, *map(kernel.pointer, (self.x, lines, y)))
        return y

    def backward(self, lines: Tensor, grad: Tensor, grad_lines: Tensor) -> Tensor:
        grad_x = torch.empty_like(self.x)
        tensors = (self.x, lines, grad, grad_x, grad_lines)
        self._library.lines_backward(self._sizes, *map(kernel.pointer, tensors))
        return grad_x


def _parts(kept: Tensor, rest: Tensor, channels: Channels, beta: float) -> list[_Part]:
    places = zip((kept, rest), (channels.kept, channels.rest), strict=True)
    return [_Part(x, at, channels.count, beta) for x, at in places if len(at)]


class _DynamicReLU(torch.autograd.Function):
    """The second layer gives numbers [4 sets, N] in (-1, 1), for one set of lines or one for each channel."""

    @staticmethod
    def forward(ctx, kept, rest, squeeze, squeeze_bias, excite, excite_bias, channels: Channels, beta: float):
        kept, images = planes(kept), len(kept)
        ctx.shared = len(rest) < images  # by all images
        rest = rest.expand(images, *rest.shape[1:]).permute(1, 2, 3, 0).contiguous()
        parts = _parts(kept, rest, channels, beta)
        means = kept.new_empty(channels.count, images)
        for part in parts:
            part.means(means)
        hidden = torch.addmm(squeeze_bias[:, None], squeeze, means).relu_()
        found = torch.addmm(excite_bias[:, None], excite, hidden, beta=0.5, alpha=0.5).tanh_()
        lines = _of_all(found, channels.count)
        kept_y, *rest_y = (part.forward(lines) for part in parts)
        ctx.save_for_backward(kept, rest, squeeze, excite, means, hidden, found)
        ctx.channels, ctx.beta = channels, beta
        return images_first(kept_y), images_first(rest_y[0] if rest_y else rest)

    @staticmethod
    @once
    def backward(ctx, *grads: Tensor):
        kept, rest, squeeze, excite, means, hidden, found = ctx.saved_tensors
        parts, lines = _parts(kept, rest, ctx.channels, ctx.beta), _of_all(found, len(means))
        grad_lines = torch.empty_like(lines)
        grads_x = [part.backward(lines, planes(grad), grad_lines) for part, grad in zip(parts, grads, strict=False)]
        if len(found) < LINES * len(means):
            grad_lines = grad_lines.sum(1)
        grad_found = torch.ops.aten.tanh_backward(grad_lines.view_as(found), found).mul_(0.5)
        grad_hidden = torch.ops.aten.threshold_backward(excite.T @ grad_found, hidden, 0)
        grad_means = squeeze.T @ grad_hidden
        for part, grad in zip(parts, grads_x, strict=True):
            part.means_backward(grad_means, grad)
        grad_kept, grad_rest = (g.permute(3, 0, 1, 2) for g in (*grads_x, torch.zeros_like(rest))[:2])
        return (
            grad_kept, grad_rest.sum(0, keepdim=True) if ctx.shared else grad_rest,
            grad_hidden @ means.T, grad_hidden.sum(1), grad_found @ hidden.T, grad_found.sum(1), None, None,
        )  # fmt: skip


def _of_all(found: Tensor, channels: int) -> Tensor:
    """[4 sets, N] as contiguous [4, channels, N]."""
    return found.view(LINES, -1, found.shape[1]).expand(LINES, channels, -1).contiguous()
