"""A compact network as an ONNX file.

The planes that one operation makes are one tensor. A sum over another tensor's planes takes one of two forms: a dense
convolution of the channels that are left ("dense"), or, where few of its weights are active ("taps"), a gather of the
planes that are read, a depthwise convolution that shifts each of them, and a pointwise convolution in groups of 16
outputs that adds them up. Which one is faster is measured.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .compact import Compact
from .node import Graph, Pair
from .onnx_model import Model, session
from .plane import Plane, Tap, window

BLOCK = 16  # channels that onnxruntime's convolutions take at a time
TRIALS = 15


def write_onnx(network: Compact, metadata: Mapping[str, str] | None = None) -> bytes:
    """The ONNX file of a network made by `compact(graph, chain=False)`, for batches of any size."""
    writer = _Writer(network.graph)
    variable = [plane for plane in network.planes if plane.values is None]
    for _, made in itertools.groupby(variable, key=lambda plane: plane.site):
        alike = defaultdict(list)
        for plane in made:
            alike[(plane.kind, plane.shape, plane.floor, *_others(plane))].append(plane)
        for (kind, *_), planes in alike.items():
            getattr(writer, {"sum": "fastest", "map": "mapped", "gather": "gathered"}.get(kind, kind))(planes)
    writer.output(network.output)
    return writer.content({"input": network.graph.input_shape}, {"output": network.graph.output_shape}, metadata)


class _Writer(Model):
    """Writes one operation's planes after the other as tensors; a tensor can hold channels that mean nothing."""

    def __init__(self, graph: Graph, prefix: str = ""):
        super().__init__(prefix)
        self.graph = graph
        self.place: dict[Plane, tuple[str, int]] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}

    def note(self, name: str, layout: Sequence[Plane | None], shape: Pair) -> None:
        """`layout` says what the channels of a tensor are."""
        self.shapes[name] = (len(layout), *shape)
        self.place |= {plane: (name, i) for i, plane in enumerate(layout) if plane is not None}

    def rows(self, planes: Sequence[Plane | None]) -> str:
        """A tensor of these planes in this order, zeros for None."""
        present = [plane for plane in planes if plane is not None]
        for plane in dict.fromkeys(present):
            if plane not in self.place:  # a constant that is read by what is no sum
                assert plane.values is not None
                self.note(self.expanded(plane.values[None]), [plane], plane.shape)
        names = list(dict.fromkeys(self.place[plane][0] for plane in present))
        widths = [self.shapes[name][0] for name in names]
        start = dict(zip(names, itertools.accumulate([0, *widths]), strict=False))
        name = names[0] if len(names) == 1 else self.op("Concat", *names, axis=1)
        if len(present) < len(planes):
            name = self.op("Pad", name, self.constant([0, 0, 0, 0, 0, 1, 0, 0]))
        zero = sum(widths)
        index = [zero if p is None else start[self.place[p][0]] + self.place[p][1] for p in planes]
        if index == list(range(zero)):
            return name
        return self.op("Gather", name, self.constant(index), axis=1)

    def input(self, planes: list[Plane]) -> None:
        name, shape = "input", self.graph.nodes[0].shape
        if len(self.graph.input_shape) < 3:
            name = self.op("Reshape", name, self.constant([-1, *shape]))
        layout: list[Plane | None] = [None] * shape[0]
        for plane in planes:
            layout[plane.index] = plane
        self.note(name, layout, shape[1:])

    def max(self, planes: list[Plane]) -> None:
        plane, tap = planes[0], planes[0].taps[0]
        extent = [(n - 1) * d + 1 for n, d in zip(plane.window, plane.dilation, strict=True)]
        end = [
            max(0, (n - 1) * s + o + e - size)
            for n, s, o, e, size in zip(plane.shape, tap.stride, tap.offset, extent, tap.source.shape, strict=True)
        ]
        pads = [-tap.offset[0], -tap.offset[1], *end]
        source = self.rows([plane.taps[0].source for plane in planes])
        name = self.op(
            "MaxPool", source, kernel_shape=plane.window, strides=tap.stride, dilations=plane.dilation, pads=pads
        )
        self.note(name, planes, plane.shape)

    def mean(self, planes: list[Plane]) -> None:
        name = self.op("GlobalAveragePool", self.rows([plane.taps[0].source for plane in planes]))
        self.note(name, planes, (1, 1))

    def mapped(self, planes: list[Plane]) -> None:
        source = self.rows([plane.taps[0].source for plane in planes])
        self.note(self.map(planes[0].function, source), planes, planes[0].shape)

    def peak(self, planes: list[Plane]) -> None:
        (height, width), many = planes[0].shape, len(planes[0].taps)
        source = self.rows([tap.source for plane in planes for tap in plane.taps])
        largest = self.op("ReduceMax", self.reshape(source, len(planes), many, height * width), axes=[2], keepdims=0)
        self.note(self.reshape(largest, len(planes), height, width), planes, planes[0].shape)

    def nearest(self, planes: list[Plane]) -> None:
        source = self.rows([plane.taps[0].source for plane in planes])
        scales = self.constant(np.array([1, 1, *planes[0].window], np.float64))
        how = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        self.note(self.op("Resize", source, "", scales, **how), planes, planes[0].shape)

    def gathered(self, planes: list[Plane]) -> None:
        sources = list(dict.fromkeys(tap.source for plane in planes for tap in plane.taps))
        size = math.prod(sources[0].shape)
        number = {source: i for i, source in enumerate(sources)}
        places = []
        for plane in planes:
            assert plane.places is not None
            starts = np.array([number[tap.source] * size for tap in plane.taps])
            at = starts[plane.places // size] + plane.places % size
            places.append(np.where(plane.places < 0, len(sources) * size, at).flatten())
        flat = self.reshape(self.rows(sources), len(sources) * size)
        if any((plane.places < 0).any() for plane in planes if plane.places is not None):
            flat = self.op("Pad", flat, self.constant([0, 0, 0, 1]))
        found = self.gather(flat, np.concatenate(places).tolist())
        self.note(self.reshape(found, len(planes), *planes[0].shape), planes, planes[0].shape)

    def dot(self, planes: list[Plane]) -> None:
        """Sums of products with planes that lie alike, or with single numbers."""
        (height, width), pairs = planes[0].shape, len(planes[0].taps) // 2
        first = self.rows([tap.source for plane in planes for tap in plane.taps[::2]])
        second = [tap for plane in planes for tap in plane.taps[1::2]]
        if second[0].stride == (1, 1) and second[0].source.shape == planes[0].shape:
            name = self.op("Mul", first, self.rows([tap.source for tap in second]))
            if pairs > 1:
                name = self.reshape(name, len(planes), pairs, height * width)
                name = self.op("ReduceSum", name, self.constant([2]), keepdims=0)
                name = self.reshape(name, len(planes), height, width)
            return self.note(name, planes, planes[0].shape)
        sources = list(dict.fromkeys(tap.source for tap in second))
        number, size = {source: i for i, source in enumerate(sources)}, math.prod(sources[0].shape)
        at = [number[t.source] * size + t.offset[0] * t.source.shape[1] + t.offset[1] for t in second]
        numbers = self.gather(self.reshape(self.rows(sources), len(sources) * size), at)
        left = self.reshape(numbers, len(planes), 1, pairs)
        name = self.op("MatMul", left, self.reshape(first, len(planes), pairs, height * width))
        self.note(self.reshape(name, len(planes), height, width), planes, planes[0].shape)

    def output(self, planes: list[Plane]) -> None:
        """The network's output; constants in it are added to zeros."""
        constant = np.stack([np.zeros(p.shape) if p.values is None else p.values for p in planes])
        if all(plane.values is not None for plane in planes):
            name = self.expanded(constant)
        else:
            name = self.rows([plane if plane.values is None else None for plane in planes])
            if constant.any():
                name = self.op("Add", name, self.constant(constant))
        self.op("Reshape", name, self.constant([-1, *self.graph.output_shape]), name="output")

    def fastest(self, planes: list[Plane]) -> None:
        """Sums, in the form that is measured fastest."""
        layout: list[Plane | None] = list(planes)
        blocked = False
        spreads = any(tap.stride == (0, 0) for plane in planes for tap in plane.taps)
        if not spreads and len(planes) > BLOCK and len({tap.source for plane in planes for tap in plane.taps}) > BLOCK:
            dense, sparse = self.milliseconds((planes, False), (_blocks(planes), True))
            layout, blocked = (layout, False) if dense < sparse else (_blocks(planes), True)
        self.note(self.sum(layout, blocked), layout, planes[0].shape)

    def milliseconds(self, *forms: tuple[Sequence[Plane | None], bool]) -> list[float]:
        """Least time that onnxruntime takes for each form of the same sums, in turn on one thread."""
        sessions = []
        for layout, blocked in forms:
            model = _Writer(self.graph, "try_")
            model.place, model.shapes = self.place, self.shapes
            name = model.sum(layout, blocked)
            read = {n: self.shapes[n] for node in model.nodes for n in node.input if n in self.shapes}
            shape = next(plane for plane in layout if plane is not None).shape
            content = model.content(read, {name: (len(layout), *shape)})
            feed = {n: np.ones((1, *shape), np.float32) for n, shape in read.items()}
            sessions.append((session(content), feed))
        times: list[list[float]] = [[] for _ in forms]
        for _ in range(TRIALS):
            for (run, feed), measured in zip(sessions, times, strict=True):
                began = time.perf_counter()
                run.run(None, feed)
                measured.append(time.perf_counter() - began)
        return [1000 * min(measured) for measured in times]

    def sum(self, layout: Sequence[Plane | None], blocked: bool) -> str:
        """The planes of `layout`; where that is in blocks, added up in groups of 16."""
        planes = [plane for plane in layout if plane is not None]
        shape = planes[0].shape
        variable = {plane: [tap for tap in plane.taps if tap.source.values is None] for plane in planes}
        pointwise = all(len(taps) == 1 and _aligned(taps[0], shape) for taps in variable.values())
        passed: list[Tap | None] = []
        added: dict[tuple[str, Pair], list[tuple[int, Tap]]] = defaultdict(list)
        for i, plane in enumerate(layout):
            taps = [] if plane is None else variable[plane]
            tap = next((tap for tap in taps if _aligned(tap, shape) and (pointwise or tap.weight == 1)), None)
            passed.append(tap)
            for other in taps:
                if other is not tap:
                    added[self.place[other.source][0], other.stride].append((i, other))
        bias = np.stack([np.zeros(shape) if plane is None else _constant_part(plane) for plane in layout])
        if (bias == bias[:, :1, :1]).all():
            bias = bias[:, :1, :1]
        terms: list[str] = []
        for (name, stride), group in added.items():
            if stride == (0, 0):  # single numbers, for all positions
                spread = [(i, tap._replace(stride=(1, 1))) for i, tap in group]
                terms.append(self.dense(name, (1, 1), spread, (len(layout), 1, 1), None))
                continue
            first = bias[:, 0, 0] if not terms and bias.shape[1:] == (1, 1) else None
            make = self.grouped if blocked else self.dense
            terms.append(make(name, stride, group, (len(layout), *shape), first))
            bias = np.zeros(1) if first is not None else bias
        if any(passed):
            name = self.rows([tap and tap.source for tap in passed])
            factors = np.array([tap.weight if tap else 1.0 for tap in passed])
            if (factors != 1).any():
                name = self.op("Mul", name, self.constant(factors[:, None, None]))
            terms.append(name)
        if bias.any():
            terms.append(self.constant(bias))
        if all(stride == (0, 0) for _, stride in added) and not any(passed):
            terms.append(self.constant(np.zeros((1, *shape))))
        name = functools.reduce(lambda a, b: self.op("Add", a, b), terms)
        floor = planes[0].floor
        return name if floor == -np.inf else self.op("Relu", name)

    def dense(self, name: str, stride: Pair, taps: list[tuple[int, Tap]], shape: Sequence[int], bias) -> str:
        """A convolution of the planes of tensor `name` that are read; taps come with the channel they are added to."""
        sources = sorted({tap.source for _, tap in taps}, key=lambda plane: self.place[plane][1])
        if len(sources) > 0.75 * self.shapes[name][0]:  # not worth a gather
            column = {plane: self.place[plane][1] for plane in sources}
            width = self.shapes[name][0]
        else:
            name = self.rows(sources)
            column, width = {plane: i for i, plane in enumerate(sources)}, len(sources)
        low, size, pads = _box(shape[1:], stride, [tap for _, tap in taps])
        weight = np.zeros((shape[0], width, *size))
        for i, tap in taps:
            weight[i, column[tap.source], tap.offset[0] - low[0], tap.offset[1] - low[1]] += tap.weight
        return self.conv(name, weight, stride, pads, 1, bias)

    def grouped(self, name: str, stride: Pair, taps: list[tuple[int, Tap]], shape: Sequence[int], bias) -> str:
        """The same in the form of taps: shifted planes, a group for every 16 channels of the result."""
        groups: list[dict[tuple[Plane, Pair], int]] = [{} for _ in range(shape[0] // BLOCK)]
        for i, tap in taps:
            groups[i // BLOCK].setdefault((tap.source, tap.offset), len(groups[i // BLOCK]))
        width = _round_up(max(map(len, groups)))
        weight = np.zeros((shape[0], width, 1, 1))
        for i, tap in taps:
            weight[i, groups[i // BLOCK][tap.source, tap.offset]] += tap.weight
        filler = [(taps[0][1].source, taps[0][1].offset)]
        read = [key for group in groups for key in [*group, *filler * (width - len(group))]]
        name = self.rows([source for source, _ in read])
        if stride != (1, 1) or any(offset != (0, 0) for _, offset in read):
            low, size, pads = _box(shape[1:], stride, [tap for _, tap in taps])
            shift = np.zeros((len(read), 1, *size))
            for i, (_, (dy, dx)) in enumerate(read):
                shift[i, 0, dy - low[0], dx - low[1]] = 1.0
            name = self.conv(name, shift, stride, pads, len(read), None)
        return self.conv(name, weight, (1, 1), (0, 0, 0, 0), len(groups), bias)


def _others(plane: Plane) -> tuple:
    """What planes of a kind must have alike, beside shape and floor, to be one tensor's."""
    if plane.kind == "dot":
        return (len(plane.taps), plane.taps[1].stride, plane.taps[1].source.shape) if plane.taps else (0,)
    if plane.kind in ("max", "mean", "map", "peak", "nearest", "gather"):
        return len(plane.taps) if plane.kind == "peak" else 0, plane.function, plane.window, plane.taps[0].source.shape
    return ()


def _aligned(tap: Tap, shape: Pair) -> bool:
    return tap.offset == (0, 0) and tap.stride == (1, 1) and tap.source.shape == shape


def _constant_part(plane: Plane) -> np.ndarray:
    """The part of a sum that does not depend on the input."""
    values = np.full(plane.shape, plane.bias)
    for source, weight, stride, offset in plane.taps:
        if source.values is not None:
            values += weight * window(source.values, plane.shape, stride, offset)
    return values


def _round_up(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _blocks(planes: list[Plane]) -> list[Plane | None]:
    """Planes in blocks of 16, those with many taps dealt out evenly, the last of a block None where too few."""
    count = _round_up(len(planes)) // BLOCK
    blocks: list[list[Plane | None]] = [[] for _ in range(count)]
    for i, plane in enumerate(sorted(planes, key=lambda plane: -len(plane.taps))):
        there = i % (2 * count)  # to and fro
        blocks[min(there, 2 * count - 1 - there)].append(plane)
    return [plane for block in blocks for plane in block + [None] * (BLOCK - len(block))]


def _box(shape: Sequence[int], stride: Pair, taps: list[Tap]) -> tuple[Pair, Pair, tuple[int, int, int, int]]:
    """Least offset, kernel size and padding of a convolution to planes of `shape` that has room for all taps."""
    axes = []
    for axis, (n, step) in enumerate(zip(shape, stride, strict=True)):
        source = taps[0].source.shape[axis]
        offsets = [tap.offset[axis] for tap in taps]
        low, high = min(0, *offsets), max(offsets)
        end = max(0, (n - 1) * step + high - source + 1)
        while (source + end - high - 1) // step + 1 > n:
            high += 1
        axes.append((low, high - low + 1, end))
    (top, height, bottom), (left, width, right) = axes
    return (top, left), (height, width), (-top, -left, bottom, right)
