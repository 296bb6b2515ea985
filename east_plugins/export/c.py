"""A compact network as one self-contained C99 file.

Every plane lies in a static arena, its rows one after another, with as many zeros around them as its readers reach over
its border. The zeros are never written, so a shifted plane is the same memory read from another address. Each
combination of shapes, stride and number of taps that occurs has a kernel of its own in which all of these are
constants, for the compiler to vectorise; addresses and weights come from two tables, read from front to back.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import indent
from typing import NamedTuple

import numpy as np

from . import kernels
from .compact import Compact
from .kernels import Kernel
from .node import Pair
from .plane import Plane

#: Taps that one pass over a plane adds up. 8 are as fast in twice the code; from 12 on addresses leave the registers.
TAPS_AT_ONCE = 4

TEMPLATE = """\
/* A sparse neural network of {taps:,} taps, made by east_plugins.

   void {name}_run(const float *input, float *output);

   input: {inputs} floats ({input_shape}), output: {outputs} floats ({output_shape}).
   Static memory: {arena_kib:.1f} KiB of activations, {table_kib:.1f} KiB of tables. Not reentrant.
   Build: cc -O3 -march=native -c {name}.c */

#include <math.h>
#include <stdint.h>

void {name}_run(const float *input, float *output);
{about}
static float arena[{arena}];

static const int32_t integers[{n_integers}] = {{
{integers}
}};

static const float floats[{n_floats}] = {{
{floats}
}};

/* Runs (kernel, count of planes, their addresses) after each other, up to -1. */
static void run(const int32_t *i, const float *f, const float *input, float *output)
{{
    (void)f;
    (void)input;
    (void)output;
    while (*i >= 0) {{
        const int32_t kernel = *i++;
        int32_t count = *i++;
        switch (kernel) {{
{cases}
        }}
    }}
}}

void {name}_run(const float *input, float *output)
{{
    static int ready = 0;
    if (!ready) {{ /* what does not depend on the input */
        run(integers, floats, input, output);
        ready = 1;
    }}
    run(integers + {first_integer}, floats + {first_float}, input, output);
}}
"""


@dataclass(frozen=True)
class CFile:
    """The text, and the static memory in bytes that it declares for activations and for tables."""

    text: str
    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    arena_bytes: int
    table_bytes: int


@dataclass
class Layout:
    """Planes of one shape: position (y, x) lies `row * y + x` after a plane's address, a plane has `size` floats."""

    shape: Pair
    row: int
    begin: int
    size: int
    free: list[int] = field(default_factory=list)
    used: int = 0


class Step(NamedTuple):
    """One plane's share of the tables for one kernel."""

    kernel: Kernel
    integers: list[int]
    floats: list[float]


def write_c(network: Compact, name: str, about: str = "") -> CFile:
    """The C file that defines `void NAME_run(const float *input, float *output)`; `about` is C text for its head."""
    layouts = _layouts(network)
    address = _place(network, layouts)
    steps = {plane: _steps(plane, layouts, address) for plane in network.planes}
    tables = _Tables()
    for constant in (True, False):
        planes = [plane for plane in network.planes if (plane.values is not None) == constant]
        for _, made in itertools.groupby(planes, key=lambda plane: plane.site):
            tables.add(steps[plane] for plane in made)
        if constant:
            tables.integers.append(-1)
            first = len(tables.integers), len(tables.floats)
    tables.add(_store(network, layouts, address))
    tables.integers.append(-1)
    tables.floats = tables.floats or [0.0]  # C has no empty arrays
    arena = sum(layout.size * layout.used for layout in layouts.values())
    shapes = network.graph.input_shape, network.graph.output_shape
    text = TEMPLATE.format(
        name=name,
        about=about,
        taps=sum(len(plane.taps) for plane in network.planes),
        inputs=math.prod(shapes[0]),
        outputs=math.prod(shapes[1]),
        input_shape=" x ".join(map(str, shapes[0])),
        output_shape=" x ".join(map(str, shapes[1])),
        arena=arena,
        arena_kib=arena / 256,
        table_kib=tables.bytes / 1024,
        n_integers=len(tables.integers),
        integers=_lines(f"{n}," for n in tables.integers),
        n_floats=len(tables.floats),
        floats=_lines(f"{_literal(x)}," for x in tables.floats),
        cases=indent("\n".join(kernels.case(kernel, n) for kernel, n in tables.kernels.items()), " " * 8),
        first_integer=first[0],
        first_float=first[1],
    )
    return CFile(text, name, *shapes, 4 * arena, tables.bytes)


def _clamped(plane: Plane) -> bool:
    """Whether a maximum must not read the zeros around its source: it may where the source is never below zero."""
    if plane.kind != "max":
        return False
    source, _, stride, offset = plane.taps[0]
    last = [(n - 1) * s + o + w for n, s, o, w in zip(plane.shape, stride, offset, plane.window, strict=True)]
    inside = min(offset) >= 0 and last[0] <= source.shape[0] and last[1] <= source.shape[1]
    return not inside and source.floor < 0


def _layouts(network: Compact) -> dict[Pair, Layout]:
    reach: dict[Pair, list[list[int]]] = {plane.shape: [[0, 0], [0, 0]] for plane in network.planes}
    for plane in network.planes:
        if _clamped(plane):
            continue
        for tap in plane.taps:
            for axis, (before, after) in enumerate(reach[tap.source.shape]):
                last = (plane.shape[axis] - 1) * tap.stride[axis] + tap.offset[axis]
                last += (plane.window[axis] - 1) * plane.dilation[axis]
                over = last - tap.source.shape[axis] + 1
                reach[tap.source.shape][axis] = [max(before, -tap.offset[axis]), max(after, over)]
    layouts = {}
    for (height, width), ((top, bottom), (left, right)) in reach.items():
        row = width + max(left, right)
        begin = top * row + left
        layouts[height, width] = Layout((height, width), row, begin, begin + (height + bottom) * row)
    return layouts


def _place(network: Compact, layouts: dict[Pair, Layout]) -> dict[Plane, int]:
    """Addresses in the arena. A plane's place is used again once the operation that reads it last is done."""
    last = {plane: plane.site for plane in network.planes}
    for plane in network.planes:
        for tap in plane.taps:
            last[tap.source] = max(last[tap.source], plane.site)
    kept = {*network.output, *(plane for plane in network.planes if plane.values is not None)}
    done: dict[int, list[Plane]] = defaultdict(list)
    slot: dict[Plane, int] = {}
    for site, planes in itertools.groupby(network.planes, key=lambda plane: plane.site):
        for plane in planes:
            layout = layouts[plane.shape]
            slot[plane] = layout.free.pop() if layout.free and plane not in kept else layout.used
            layout.used = max(layout.used, slot[plane] + 1)
            if plane not in kept:
                done[last[plane]].append(plane)
        for end in [end for end in done if end <= site]:
            for plane in done.pop(end):
                layouts[plane.shape].free.append(slot[plane])
    starts, start = {}, 0
    for shape, layout in layouts.items():
        starts[shape], start = start + layout.begin, start + layout.size * layout.used
    return {plane: starts[plane.shape] + n * layouts[plane.shape].size for plane, n in slot.items()}


def _steps(plane: Plane, layouts: dict[Pair, Layout], address: dict[Plane, int]) -> list[Step]:
    """What computes a plane, in order."""
    out, here = layouts[plane.shape], address[plane]
    if plane.kind == "input":
        return [Step(Kernel("load", out.shape, out.row), [here, plane.index * out.shape[0] * out.shape[1]], [])]
    if plane.kind == "table" or (plane.kind != "sum" and not plane.taps):
        assert plane.values is not None
        return [Step(Kernel("table", out.shape, out.row), [here], plane.values.flatten().tolist())]
    if plane.kind == "gather":
        return [Step(Kernel("gather", out.shape, out.row), [here, *_addresses(plane, layouts, address)], [])]
    if plane.kind == "dot":
        return [_dot_step(plane, layouts, address)]
    if plane.kind in ("map", "peak", "nearest"):
        row = layouts[plane.taps[0].source.shape].row
        window = plane.window if plane.kind == "nearest" else (1, 1)
        kernel = Kernel(plane.kind, out.shape, out.row, len(plane.taps), source_row=row, window=window)
        sources = [address[tap.source] for tap in plane.taps]
        return [Step(kernel._replace(function=plane.function), [here, *sources], [])]
    if plane.kind != "sum":
        source, _, stride, offset = plane.taps[0]
        row = layouts[source.shape].row
        kernel = Kernel(plane.kind, out.shape, out.row, 1, source.shape, row, stride, plane.window, plane.dilation)
        if _clamped(plane):
            return [Step(kernel._replace(kind="clamped", offset=offset), [here, address[source]], [])]
        return [Step(kernel, [here, address[source] + offset[0] * row + offset[1]], [])]
    groups: dict[tuple[int, Pair], list[tuple[int, float]]] = defaultdict(list)
    for source, weight, stride, (dy, dx) in plane.taps:
        row = layouts[source.shape].row
        single = plane.shape == (1, 1)  # one position has neither rows nor a stride
        groups[(1, (1, 1)) if single else (row, stride)].append((address[source] + dy * row + dx, weight))
    passes = []
    for (row, stride), taps in groups.items() or [((1, (1, 1)), [])]:
        short = len(taps) % TAPS_AT_ONCE  # goes first, so that few kernels are needed that add
        starts = [0] * bool(short or not taps) + list(range(short, len(taps), TAPS_AT_ONCE))
        passes += [(row, stride, taps[i:j]) for i, j in itertools.pairwise([*starts, len(taps)])]
    steps: list[Step] = []
    for row, stride, taps in passes:
        kernel = Kernel("add" if steps else "sum", out.shape, out.row, len(taps), (1, 1), row, stride)
        bias = [] if steps else [plane.bias]
        floor = plane.floor if len(steps) == len(passes) - 1 else -np.inf
        steps.append(Step(kernel, [here, *(a for a, _ in taps)], [*bias, floor, *(w for _, w in taps)]))
    return steps


def _addresses(plane: Plane, layouts: dict[Pair, Layout], address: dict[Plane, int]) -> list[int]:
    """Where each number of a gathered plane lies."""
    assert plane.places is not None
    source = plane.taps[0].source.shape
    rows, columns = np.divmod(np.arange(math.prod(source)), source[1])
    here = rows * layouts[source].row + columns
    numbers = np.concatenate([address[tap.source] + here for tap in plane.taps])
    return np.where(plane.places < 0, -1, numbers[plane.places]).flatten().tolist()


def _dot_step(plane: Plane, layouts: dict[Pair, Layout], address: dict[Plane, int]) -> Step:
    """Products of pairs; all first taps lie alike, and all second ones."""
    out = layouts[plane.shape]
    addresses = []
    for source, _, _, (dy, dx) in plane.taps:
        addresses.append(address[source] + dy * layouts[source.shape].row + dx)
    first, second = plane.taps[:2] if plane.taps else (None, None)
    if first is None or second is None:
        return Step(Kernel("dot", out.shape, out.row, 0), [address[plane]], [])
    single = plane.shape == (1, 1)
    kernel = Kernel(
        "dot", out.shape, out.row, len(plane.taps) // 2,
        source_row=1 if single else layouts[first.source.shape].row, stride=(1, 1) if single else first.stride,
        other_row=1 if single else layouts[second.source.shape].row, other_stride=(1, 1) if single else second.stride,
    )  # fmt: skip
    return Step(kernel, [address[plane], *addresses], [])


def _store(network: Compact, layouts: dict[Pair, Layout], address: dict[Plane, int]) -> Iterable[list[Step]]:
    for index, plane in enumerate(network.output):
        kernel = Kernel("store", plane.shape, layouts[plane.shape].row)
        yield [Step(kernel, [address[plane], index * plane.shape[0] * plane.shape[1]], [])]


class _Tables:
    """The numbers that kernels read, in order, and the kernels' own numbers."""

    def __init__(self):
        self.integers: list[int] = []
        self.floats: list[float] = []
        self.kernels: dict[Kernel, int] = {}

    @property
    def bytes(self) -> int:
        return 4 * (len(self.integers) + len(self.floats))

    def add(self, planes: Iterable[list[Step]]) -> None:
        """Add planes that do not read each other: the first step of all of them, then the second, and so on."""
        rounds: dict[tuple[int, Kernel], list[Step]] = defaultdict(list)
        for steps in planes:
            for number, step in enumerate(steps):
                rounds[number, step.kernel].append(step)
        for (_, kernel), steps in sorted(rounds.items(), key=lambda item: item[0]):
            self.integers += [self.kernels.setdefault(kernel, len(self.kernels)), len(steps)]
            self.integers += itertools.chain.from_iterable(step.integers for step in steps)
            self.floats += itertools.chain.from_iterable(step.floats for step in steps)


def _literal(value: float) -> str:
    """A float32 that reads back the same."""
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = str(np.float32(value))
    return text + ("f" if "." in text or "e" in text else ".0f")


def _lines(items: Iterable[str]) -> str:
    """Eight a line."""
    items = list(items)
    return "\n".join("    " + " ".join(items[i : i + 8]) for i in range(0, len(items), 8))
