"""Planes, of which a compact network consists, and their values where they are constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .node import Pair


class Tap(NamedTuple):
    """What a plane reads: `weight * source[y * stride + dy, x * stride + dx]`, `offset` being (dy, dx)."""

    source: Plane
    weight: float
    stride: Pair = (1, 1)
    offset: Pair = (0, 0)


@dataclass(eq=False)
class Plane:
    """One channel, of shape (height, width).

    `kind` is "input" (channel `index` of it), "sum", "max" and "mean" over `window` at every position of the one
    tap, "map" (`function` of the one tap), "dot" (sum of products of taps, the first with the second and so on), "peak"
    (the largest of all taps), "nearest" (the one tap's source, `window` times as large), "gather" (numbers of the taps'
    sources, at `places` in these one after the other; zero where that is negative) or "table" (`values` alone).
    `values` are set for a constant, which does not depend on the input. Planes of one `site` do not read each other;
    sites come in order of execution.
    """

    shape: Pair
    kind: str = "sum"
    bias: float = 0.0
    taps: list[Tap] = field(default_factory=list)
    floor: float = -np.inf
    window: Pair = (1, 1)
    dilation: Pair = (1, 1)
    index: int = 0
    function: str = ""
    places: np.ndarray | None = None
    values: np.ndarray | None = None
    site: int = -1

    @property
    def number(self) -> float | None:
        """The value of a constant that is the same at all positions."""
        if self.values is None or (self.values != self.values.flat[0]).any():
            return None
        return float(self.values.flat[0])

    def inlines(self, single: bool) -> bool:
        """Whether a reader of each position by itself takes over the sum instead of reading its result: where it is
        the only one, or the sum is short."""
        return self.kind == "sum" and (single or len(self.taps) <= 1)


def window(values: np.ndarray, shape: Pair, stride: Pair, offset: Pair, outside: float = 0.0) -> np.ndarray:
    """`values[y * stride + dy, x * stride + dx]` for the positions of `shape`."""
    rows, columns = (np.arange(n) * s + o for n, s, o in zip(shape, stride, offset, strict=True))
    height, width = values.shape
    inside = np.logical_and.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    return np.where(inside, values[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))], outside)


def evaluate(plane: Plane) -> np.ndarray:
    """The values of a plane of constants."""
    values = [tap.source.values for tap in plane.taps if tap.source.values is not None]
    if plane.kind == "gather":
        assert plane.places is not None
        numbers = np.concatenate([each.flatten() for each in values])
        return np.where(plane.places < 0, 0.0, numbers[plane.places])
    if plane.kind == "mean":
        return np.full(plane.shape, values[0].mean())
    if plane.kind == "nearest":
        return values[0].repeat(plane.window[0], 0).repeat(plane.window[1], 1)
    taps = zip(plane.taps, values, strict=True)
    read = [window(each, plane.shape, tap.stride, tap.offset) for tap, each in taps]
    if plane.kind == "sum":
        return np.maximum(plane.bias + sum(t.weight * v for t, v in zip(plane.taps, read, strict=True)), plane.floor)
    if plane.kind == "map":
        return NUMPY[plane.function](read[0])
    if plane.kind == "dot":
        return sum((a * b for a, b in zip(read[::2], read[1::2], strict=True)), np.zeros(plane.shape))
    assert plane.kind == "peak"
    return np.max(read, axis=0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


#: The functions of one number, in float64.
NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "tanh": np.tanh,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu6": lambda x: np.clip(x, 0, 6),
    "exp": np.exp,
    "log": np.log,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
}
