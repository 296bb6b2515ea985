"""The fixed matrix of DCTpS layers and two ways to apply it without storing it (Price and Tanner 2021).

For a weight of shape (out, channels, *kernel) a patch is the vector of channels x taps numbers, taps outermost, and
D takes it, padded with zeros to n = max(channels x taps, out), to the first `out` coefficients of its orthonormal
DCT-II:  D[k, j] = s_k cos(pi k (2j + 1) / 2n),  s_0 = sqrt(1/n),  s_k = sqrt(2/n),  j = tap x channels + channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def size(shape: Sequence[int]) -> int:
    """n, the length of the transform of a weight of this shape."""
    return max(math.prod(shape[1:]), shape[0])


def macs(shape: Sequence[int], groups: int = 1) -> float:
    """Multiply-accumulates of the fast transform at one output position: n log2(n) / 2 a group."""
    n = size(shape)
    return groups * n * math.log2(n) / 2


_made: dict[tuple, Tensor | list] = {}


def _constant(make):
    """Keeps what `make` returns: one tensor for all layers of a shape, in no module, state dict or broadcast."""

    @functools.wraps(make)
    def get(*args):
        if type(torch.empty(0)) is not Tensor:  # torch.export traces with fake tensors
            return make(*args)
        key = (make.__name__, *args)
        if key not in _made:
            with torch.inference_mode(False):  # training uses it too
                _made[key] = make(*args)
        return _made[key]

    return get


@_constant
def matrix(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """D in the layout of a weight of this shape, computed in float64."""
    out, channels, *kernel = shape
    j = torch.arange(math.prod(shape[1:]), dtype=torch.float64, device="cpu")
    angle = _frequency(shape) * (2 * j + 1) / 2
    weight = (_scale(shape) * angle.cos()).reshape(out, *kernel, channels).movedim(-1, 1)
    # `contiguous` would leave a 1x1 kernel the strides of channels-last, for which oneDNN takes another path
    return torch.empty(shape, dtype=dtype, device=device).copy_(weight)


@_constant
def factors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Two pairs (A, B), A of shape (out, channels, 1, ...) and B (out, 1, *kernel), with D = A1 B1 + A2 B2.

    The angle of D is a sum of one of the channel and one of the tap, and cos(a + b) = cos a cos b - sin a sin b.
    """
    out, channels, *kernel = shape
    channel = torch.arange(channels, dtype=torch.float64, device="cpu")
    tap = torch.arange(math.prod(kernel), dtype=torch.float64, device="cpu")
    a = (_frequency(shape) * (2 * channel + 1) / 2).reshape(out, channels, *[1] * len(kernel))
    b = (_frequency(shape) * tap * channels).reshape(out, 1, *kernel)
    scale = _scale(shape).reshape(out, 1, *[1] * len(kernel))
    pairs = (scale * a.cos(), b.cos()), (-scale * a.sin(), b.sin())
    return [(first.to(device, dtype), second.to(device, dtype)) for first, second in pairs]


def dct(input: Tensor, out: int) -> Tensor:
    """First `out` coefficients of the orthonormal DCT-II of the last dimension, padded with zeros where shorter.

    By one real FFT of the same length (Makhoul 1980), O(n log n).
    """
    length = input.shape[-1]
    n = max(length, out)
    if length < n:
        input = F.pad(input, (0, n - length))
    spectrum = torch.fft.rfft(torch.cat([input[..., ::2], input[..., 1::2].flip(-1)], -1))
    spectrum = spectrum * _twiddle(n, spectrum.dtype, spectrum.device)
    if out <= spectrum.shape[-1]:
        return spectrum.real[..., :out]
    return torch.cat([spectrum.real, -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)[..., :out]


def patches(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The patches that a convolution with these settings sees in `input` (batch, channels, *positions): shape
    (batch, *output positions, groups, taps x channels / groups), in the order of D's columns."""
    input = F.pad(input, [p for p in reversed(padding) for _ in range(2)])
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        input = input.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    input = input.unflatten(1, (groups, -1)).movedim(2, -1).movedim(1, 1 + len(kernel))
    return input.flatten(2 + len(kernel))


@_constant
def _twiddle(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu")
    return torch.polar(_scale((n, n))[: len(k), 0], -math.pi * k / (2 * n)).to(device, dtype)


def _frequency(shape: Sequence[int]) -> Tensor:
    return torch.arange(shape[0], dtype=torch.float64, device="cpu")[:, None] * math.pi / size(shape)


def _scale(shape: Sequence[int]) -> Tensor:
    n = size(shape)
    scale = torch.full((shape[0], 1), math.sqrt(2 / n), dtype=torch.float64, device="cpu")
    scale[0] = math.sqrt(1 / n)
    return scale
