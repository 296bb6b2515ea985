"""Exact compaction: a network as the planes that its output depends on.

A plane is one channel of one activation. Most planes are a sum over shifted planes,

    max(floor, bias + sum of weight * source[y * stride + dy, x * stride + dx])

with zeros outside the source, so that a convolution, its norm, a residual addition and ReLU become one plane. Planes
that do not depend on the input are constants: numbers go into the bias of what reads them. At a zero-padded border
the contribution of a constant is no number; there a plane of ones is read in its place. Planes that nobody reads are
left out. All folding is done in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .node import Graph, Node, Pair
from .plane import Plane, Tap, evaluate, window

#: With more active weights than this a network is not followed plane by plane.
MOST_WEIGHTS = 4_000_000

#: Sites of one operation of the graph: those of what it needs before its result.
STAGES = 8


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
        op = "constant_node" if node.op == "constant" else node.op
        single = [users[source] == 1 for source in node.inputs]
        tensors[node] = list(getattr(_Builder(node, ones, chain, STAGES * site), op)(*sources, *single))
        for plane in tensors[node]:
            plane.site = STAGES * (site + 1) - 1 if plane.site < 0 else plane.site
    output = tensors[graph.output]
    return Compact(_live(output), output, graph)


def too_dense(graph: Graph) -> str | None:
    """Why a network cannot be followed plane by plane, naming the layers, or None where it can."""
    counts = {
        node: np.count_nonzero(node.weight) if node.op == "conv" else node.index.size
        for node in graph.nodes
        if node.op in ("conv", "dot")
    }
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
        if stride == 0:
            some, every = (each and 0 <= offset < size for each in (some, every))
            continue
        first = max(0, -(offset // stride))
        some = some and first < n and first * stride + offset < size
        every = every and offset >= 0 and (n - 1) * stride + offset < size
    return some, every


class _Builder:
    """Makes the planes of one operation."""

    def __init__(self, node: Node, ones: dict[Pair, Plane], chain: bool, site: int):
        self.node, self.shape, self.ones, self.chain, self.site = node, node.shape[1:], ones, chain, site

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

    def cat(self, *sources):
        for planes in sources[: len(sources) // 2]:
            yield from planes

    def constant_node(self):
        for values in self.node.weight:
            plane = Plane(self.shape, "table", values=values)
            yield plane if plane.number is None else self.constant(plane.number)

    # ------------------------------------------------------------------ what is no sum

    def map(self, sources: list[Plane], single: bool):
        for source in sources:
            yield self.mapped(self.node.function, source)

    def mapped(self, function: str, source: Plane, stage: int = -1) -> Plane:
        return self.made(Plane(source.shape, "map", taps=[Tap(source, 1.0)], function=function), stage)

    def mul(self, first: list[Plane], second: list[Plane], first_single: bool, second_single: bool):
        for a, b in zip(first, second, strict=True):
            for one, other, single in ((a, b, second_single), (b, a, first_single)):
                if one.number is not None:
                    yield self.scaled(other, one.number, 0.0, single)
                    break
            else:
                yield self.product([(Tap(a, 1.0), _spread(b))])

    def product(self, pairs: list[tuple[Tap, Tap]], stage: int = -1) -> Plane:
        """The sum of products of taps; the second of a pair lies as the plane does, or is one number."""
        kept = [pair for pair in pairs if all(tap.source.number != 0 for tap in pair)]
        return self.made(Plane(pairs[0][0].source.shape, "dot", taps=[tap for pair in kept for tap in pair]), stage)

    def dot(self, first: list[Plane], second: list[Plane], first_single: bool, second_single: bool):
        index, each = self.node.index, len(self.node.index) // self.node.groups
        height, width = second[0].shape
        for c, places in enumerate(index):
            group = c // each * index.shape[1]
            pairs = []
            for k, place in enumerate(places.tolist()):
                channel, position = divmod(place, height * width)
                tap = Tap(second[channel], 1.0, (0, 0), divmod(position, width))
                pairs.append((Tap(first[group + k], 1.0), tap))
            yield self.product(pairs)

    def layer_norm(self, sources: list[Plane], single: bool):
        share = 1 / len(sources)
        mean = self.staged(self.sum(0.0, [Tap(plane, share) for plane in sources]), 0)
        centred = [self.staged(self.sum(0.0, [Tap(plane, 1.0), Tap(mean, -1.0)]), 1) for plane in sources]
        squares = self.product([(Tap(plane, 1.0), Tap(plane, 1.0)) for plane in centred], 2)
        variance = self.staged(self.sum(self.node.eps, [Tap(squares, share)]), 3)
        factor = self.mapped("rsqrt", variance, 4)
        for plane in centred:
            yield self.product([(Tap(plane, 1.0), Tap(factor, 1.0))])

    def group_norm(self, sources: list[Plane], single: bool):
        size = len(sources) // self.node.groups
        for start in range(0, len(sources), size):
            group = sources[start : start + size]
            mean = self.mean_of(group, 0, 0.0)
            centred = [self.staged(self.sum(0.0, [Tap(p, 1.0), Tap(mean, -1.0, (0, 0))]), 2) for p in group]
            squares = [self.product([(Tap(plane, 1.0), Tap(plane, 1.0))], 3) for plane in centred]
            factor = self.mapped("rsqrt", self.mean_of(squares, 4, self.node.eps), 6)
            for plane in centred:
                yield self.product([(Tap(plane, 1.0), Tap(factor, 1.0, (0, 0)))])

    def mean_of(self, planes: list[Plane], stage: int, more: float) -> Plane:
        """The mean over positions and planes, plus a number; of two stages."""
        means = [self.made(Plane((1, 1), "mean", taps=[Tap(p, 1.0)], window=p.shape), stage) for p in planes]
        builder = _Builder(Node("", "", (), (1, 1, 1)), self.ones, self.chain, self.site)
        return self.staged(builder.sum(more, [Tap(plane, 1 / len(planes)) for plane in means]), stage + 1)

    def softmax(self, sources: list[Plane], single: bool):
        size = len(sources) // self.node.groups
        for start in range(0, len(sources), size):
            group = sources[start : start + size]
            peak = self.made(Plane(self.shape, "peak", taps=[Tap(plane, 1.0) for plane in group]), 0)
            lower = [self.staged(self.sum(0.0, [Tap(plane, 1.0), Tap(peak, -1.0)]), 1) for plane in group]
            powers = [self.mapped("exp", plane, 2) for plane in lower]
            total = self.staged(self.sum(0.0, [Tap(plane, 1.0) for plane in powers]), 3)
            if self.node.op == "softmax":
                factor = self.mapped("reciprocal", total, 4)
                yield from (self.product([(Tap(plane, 1.0), Tap(factor, 1.0))]) for plane in powers)
            else:
                log = self.mapped("log", total, 4)
                yield from (self.sum(0.0, [Tap(plane, 1.0), Tap(log, -1.0)]) for plane in lower)

    log_softmax = softmax

    def pick(self, sources: list[Plane], single: bool):
        size = math.prod(sources[0].shape)
        for places in self.node.index:
            channels = np.unique(places[places >= 0] // size)
            if not len(channels):
                yield self.constant(0.0)
            elif len(channels) == 1:
                yield self.picked(sources[channels[0]], np.where(places < 0, -1, places - channels[0] * size))
            else:
                yield self.gathered([sources[channel] for channel in channels], channels, places)

    def gathered(self, sources: list[Plane], channels: np.ndarray, places: np.ndarray) -> Plane:
        size = math.prod(sources[0].shape)
        numbers = np.searchsorted(channels, places // size) * size + places % size
        taps = [Tap(source, 1.0, (0, 0)) for source in sources]
        return self.made(Plane(self.shape, "gather", taps=taps, places=np.where(places < 0, -1, numbers)), -1)

    def picked(self, source: Plane, places: np.ndarray) -> Plane:
        """The numbers of a plane at `places`, and zeros where they are negative."""
        if (tap := _tap_of(source, places)) is not None:
            return source if tap == Tap(source, 1.0) and self.shape == source.shape else self.sum(0.0, [tap])
        if (places == places.flat[0]).all():  # one number at all positions
            row, column = divmod(int(places.flat[0]), source.shape[1])
            number = source
            if source.shape != (1, 1):
                number = self.staged(Plane((1, 1), taps=[Tap(source, 1.0, offset=(row, column))]), 0)
            return self.sum(0.0, [Tap(number, 1.0, (0, 0))])
        if (scale := _enlarged(places, source.shape)) is not None:
            return self.made(Plane(self.shape, "nearest", taps=[Tap(source, 1.0, (0, 0))], window=scale), -1)
        return self.gathered([source], np.zeros(1, np.int64), places)

    def made(self, plane: Plane, stage: int) -> Plane:
        """A plane that is no sum, at one of the operation's stages; its values where it is a constant."""
        if all(tap.source.values is not None for tap in plane.taps):
            plane.values = evaluate(plane)
            if plane.number is not None:
                plane = Plane(plane.shape, bias=plane.number, values=plane.values)
        return self.staged(plane, stage)

    def staged(self, plane: Plane, stage: int) -> Plane:
        if plane.site < 0 and stage >= 0:
            plane.site = self.site + stage
        return plane


def _spread(plane: Plane) -> Tap:
    """A tap of a plane; of the one number that a plane only spreads."""
    tap = plane.taps[0] if plane.kind == "sum" and len(plane.taps) == 1 else None
    plain = tap is not None and (plane.bias, plane.floor, tap.weight) == (0, -np.inf, 1) and plane.values is None
    return tap if tap is not None and plain and tap.stride == (0, 0) else Tap(plane, 1.0)


def _tap_of(source: Plane, places: np.ndarray) -> Tap | None:
    """The tap that reads a plane at just these places, and outside of it where they are negative."""
    inside = np.argwhere(places >= 0)
    first, last = inside[0], inside[-1]
    stride, offset = [1, 1], [0, 0]
    for axis, at in enumerate((places // source.shape[1], places % source.shape[1])):
        if last[axis] > first[axis]:
            steps = at[tuple(last)] - at[tuple(first)]
            stride[axis] = int(steps // (last[axis] - first[axis]))
        offset[axis] = int(at[tuple(first)] - first[axis] * stride[axis])
    if min(stride) < 1:
        return None
    tap = Tap(source, 1.0, (stride[0], stride[1]), (offset[0], offset[1]))
    numbers = np.arange(1, 1 + math.prod(source.shape)).reshape(source.shape)
    read = window(numbers, (places.shape[0], places.shape[1]), tap.stride, tap.offset)
    return tap if (read == places + 1).all() else None


def _enlarged(places: np.ndarray, source: Pair) -> Pair | None:
    """The whole factors by which a plane is enlarged that is read at these places."""
    if any(np.mod(places.shape, source)):
        return None
    scale = places.shape[0] // source[0], places.shape[1] // source[1]
    numbers = np.arange(math.prod(source)).reshape(source)
    return scale if (numbers.repeat(scale[0], 0).repeat(scale[1], 1) == places).all() else None


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
