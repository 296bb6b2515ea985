"""Exact compaction: a network as the planes that its output depends on.

A plane is one channel of one activation. Most planes are a sum over shifted planes,

    max(floor, bias + sum of weight * source[y * stride + dy, x * stride + dx])

with zeros outside the source, so that a convolution, its norm, a residual addition and ReLU become one plane. Planes
that do not depend on the input are constants: numbers go into the bias of what reads them. At a zero-padded border
the contribution of a constant is no number; there a plane of ones is read in its place. Planes that nobody reads are
left out. All folding is done in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .graph import Graph, Node, Pair

#: With more active weights than this a network is not followed plane by plane.
MOST_WEIGHTS = 4_000_000


class Tap(NamedTuple):
    """What a plane reads: `weight * source[y * stride + dy, x * stride + dx]`, `offset` being (dy, dx)."""

    source: Plane
    weight: float
    stride: Pair = (1, 1)
    offset: Pair = (0, 0)


@dataclass(eq=False)
class Plane:
    """One channel, of shape (height, width).

    `kind` is "input" (channel `index` of it), "sum", or "max" and "mean" over `window` at every position of the one
    tap. `values` are set for a constant, which does not depend on the input. `site` is the number of the operation
    in the graph that made it.
    """

    shape: Pair
    kind: str = "sum"
    bias: float = 0.0
    taps: list[Tap] = field(default_factory=list)
    floor: float = -np.inf
    window: Pair = (1, 1)
    dilation: Pair = (1, 1)
    index: int = 0
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


@dataclass(frozen=True)
class Compact:
    """The planes that the output depends on, in order of execution, and those that are the output."""

    planes: list[Plane]
    output: list[Plane]
    graph: Graph


def compact(graph: Graph, chain: bool = True) -> Compact:
    """Follow a network plane by plane.

    With `chain`, a constant added to a plane with a floor makes no plane in between: a channel that residual blocks
    pass on unread is computed once. Without it, planes of one operation read those of the ones right before it.

    Raises `UsageError` where `too_dense` finds it so.
    """
    if reason := too_dense(graph):
        raise UsageError(reason)
    users = Counter(source for node in graph.nodes for source in node.inputs)
    ones: dict[Pair, Plane] = {}
    tensors: dict[Node, list[Plane]] = {}
    for site, node in enumerate(graph.nodes):
        sources = [tensors[source] for source in node.inputs]
        single = [users[source] == 1 for source in node.inputs]
        tensors[node] = list(getattr(_Builder(node, ones, chain), node.op)(*sources, *single))
        for plane in tensors[node]:
            plane.site = site if plane.site < 0 else plane.site
    output = tensors[graph.output]
    return Compact(_live(output), output, graph)


def too_dense(graph: Graph) -> str | None:
    """Why a network cannot be followed plane by plane, naming the layers, or None where it can."""
    counts = {node: np.count_nonzero(node.weight) for node in graph.nodes if node.op == "conv"}
    if sum(counts.values()) <= MOST_WEIGHTS:
        return None
    names = [node.name for node in sorted(counts, key=lambda node: -counts[node])]
    return (
        f"{sum(counts.values()):,} active weights, most in {', '.join(names[:3])}, are too many for a sparse network: "
        f"at most {MOST_WEIGHTS:,}"
    )


def _live(output: Iterable[Plane]) -> list[Plane]:
    found: dict[Plane, None] = {}
    waiting = list(output)
    while waiting:
        plane = waiting.pop()
        if plane not in found:
            found[plane] = None
            waiting.extend(tap.source for tap in plane.taps)
    return sorted(found, key=lambda plane: plane.site)


def _reads(tap: Tap, shape: Pair) -> tuple[bool, bool]:
    """Whether any, and whether every position of a plane of `shape` reads inside the tap's source."""
    some = every = True
    for n, size, stride, offset in zip(shape, tap.source.shape, tap.stride, tap.offset, strict=True):
        first = max(0, -(offset // stride))
        some = some and first < n and first * stride + offset < size
        every = every and offset >= 0 and (n - 1) * stride + offset < size
    return some, every


def window(values: np.ndarray, shape: Pair, stride: Pair, offset: Pair, outside: float = 0.0) -> np.ndarray:
    """`values[y * stride + dy, x * stride + dx]` for the positions of `shape`."""
    rows, columns = (np.arange(n) * s + o for n, s, o in zip(shape, stride, offset, strict=True))
    height, width = values.shape
    inside = np.logical_and.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    return np.where(inside, values[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))], outside)


class _Builder:
    """Makes the planes of one operation."""

    def __init__(self, node: Node, ones: dict[Pair, Plane], chain: bool):
        self.node, self.shape, self.ones, self.chain = node, node.shape[1:], ones, chain

    def constant(self, number: float) -> Plane:
        return Plane(self.shape, bias=number, values=np.full(self.shape, number))

    def sum(self, bias: float, taps: Iterable[Tap], floor: float = -np.inf) -> Plane:
        """The plane `max(floor, bias + taps)`, constants folded."""
        merged: dict[tuple, Tap] = {}
        for tap in taps:
            some, every = _reads(tap, self.shape)
            number = tap.source.number
            if not some or number == 0:
                continue
            if number is not None:
                if every:
                    bias += tap.weight * number
                    continue
                tap = tap._replace(source=self.one(tap.source.shape), weight=tap.weight * number)
            key = (tap.source, tap.stride, tap.offset)
            merged[key] = tap._replace(weight=tap.weight + (merged[key].weight if key in merged else 0))
        kept = [tap for tap in merged.values() if tap.weight != 0]
        plane = Plane(self.shape, bias=bias, taps=kept, floor=floor)
        if all(tap.source.values is not None for tap in kept):
            values: np.ndarray = np.full(self.shape, bias)
            for tap in kept:
                assert tap.source.values is not None
                values += tap.weight * window(tap.source.values, self.shape, tap.stride, tap.offset)
            plane.values = np.maximum(values, floor)
            if plane.number is not None:
                return self.constant(plane.number)
        return plane

    def one(self, shape: Pair) -> Plane:
        return self.ones.setdefault(shape, Plane(shape, bias=1.0, values=np.ones(shape), site=0))

    def input(self):
        for channel in range(self.node.shape[0]):
            yield Plane(self.shape, "input", index=channel)

    def conv(self, sources: list[Plane], single: bool):
        node = self.node
        weight, bias = node.weight, node.bias
        outputs, inputs = weight.shape[:2]
        taps: list[list[Tap]] = [[] for _ in range(outputs)]
        for o, i, ky, kx in np.argwhere(weight).tolist():
            source = sources[o // (outputs // node.groups) * inputs + i]
            offset = (ky * node.dilation[0] - node.padding[0], kx * node.dilation[1] - node.padding[1])
            taps[o].append(_through(Tap(source, float(weight[o, i, ky, kx]), node.stride, offset)))
        for o in range(outputs):
            yield self.sum(0.0 if bias is None else float(bias[o]), taps[o])

    def affine(self, sources: list[Plane], single: bool):
        assert self.node.bias is not None
        for plane, scale, shift in zip(sources, self.node.weight.tolist(), self.node.bias.tolist(), strict=True):
            yield self.scaled(plane, scale, shift, single)

    def scaled(self, plane: Plane, scale: float, shift: float, single: bool) -> Plane:
        """scale * plane + shift."""
        if scale == 1 and shift == 0:
            return plane
        if plane.inlines(single) and (plane.floor == -np.inf or (self.chain and scale > 0)):
            taps = [tap._replace(weight=tap.weight * scale) for tap in plane.taps]
            floor = plane.floor * scale + shift if scale > 0 else -np.inf
            return self.sum(plane.bias * scale + shift, taps, floor)
        return self.sum(shift, [Tap(plane, scale)])

    def relu(self, sources: list[Plane], single: bool):
        for plane in sources:
            if plane.floor >= 0:
                yield plane
            elif plane.inlines(single):
                yield self.sum(plane.bias, plane.taps, 0.0)
            else:
                yield self.sum(0.0, [Tap(plane, 1.0)], 0.0)

    def add(self, first: list[Plane], second: list[Plane], first_single: bool, second_single: bool):
        for a, b in zip(first, second, strict=True):
            if a.number is not None:
                yield self.scaled(b, 1.0, a.number, second_single)
            elif b.number is not None:
                yield self.scaled(a, 1.0, b.number, first_single)
            else:
                bias, taps = 0.0, []
                for plane, single in ((a, first_single), (b, second_single)):
                    inline = plane.inlines(single) and plane.floor == -np.inf
                    bias += plane.bias if inline else 0.0
                    taps += plane.taps if inline else [Tap(plane, 1.0)]
                yield self.sum(bias, taps)

    def max_pool(self, sources: list[Plane], single: bool):
        node = self.node
        for source in sources:
            tap = Tap(source, 1.0, node.stride, (-node.padding[0], -node.padding[1]))
            plane = Plane(self.shape, "max", taps=[tap], window=node.kernel, dilation=node.dilation)
            if source.values is not None:
                plane.values = np.max(
                    [window(source.values, self.shape, node.stride, offset, -np.inf) for offset in _offsets(node)],
                    axis=0,
                )
            yield plane if plane.number is None else self.constant(plane.number)

    def avg_pool(self, sources: list[Plane], single: bool):
        node = self.node
        weight = 1 / (node.kernel[0] * node.kernel[1])
        for source in sources:
            if self.shape == (1, 1) and node.kernel == source.shape and source.values is None:
                yield Plane(self.shape, "mean", taps=[Tap(source, 1.0)], window=node.kernel)
            else:
                yield self.sum(0.0, [Tap(source, weight, node.stride, offset) for offset in _offsets(node)])

    def flatten(self, sources: list[Plane], single: bool):
        for source in sources:
            for position in np.ndindex(source.shape):
                yield self.sum(0.0, [Tap(source, 1.0, offset=position)])

    def cat(self, *sources):
        for planes in sources[: len(sources) // 2]:
            yield from planes


def _through(tap: Tap) -> Tap:
    """Read a single value where it is taken from, past the plane that only holds it."""
    source = tap.source
    copies = source.kind == "sum" and source.shape == (1, 1) and len(source.taps) == 1
    if copies and source.bias == 0 and source.floor == -np.inf and tap.offset == (0, 0):
        behind = source.taps[0]
        return behind._replace(weight=behind.weight * tap.weight, stride=(1, 1))
    return tap


def _offsets(node: Node) -> list[Pair]:
    return [
        (ky * node.dilation[0] - node.padding[0], kx * node.dilation[1] - node.padding[1])
        for ky, kx in np.ndindex(*node.kernel)
    ]
