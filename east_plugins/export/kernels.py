"""Kernels of the exported C file, one for each combination of shapes, stride and number of taps."""

from __future__ import annotations

from textwrap import indent
from typing import NamedTuple

from .graph import Pair


class Kernel(NamedTuple):
    """What is done for a plane, and the constants it is done with.

    `kind` is sum, add (to what is there), max, clamped (max with indices kept inside the source), mean, load (from
    the input) or store (to the output). Planes have `shape` and rows `row` apart, sources likewise.
    """

    kind: str
    shape: Pair
    row: int
    taps: int = 1
    source: Pair = (1, 1)
    source_row: int = 1
    stride: Pair = (1, 1)
    window: Pair = (1, 1)
    dilation: Pair = (1, 1)
    offset: Pair = (0, 0)


def case(kernel: Kernel, number: int) -> str:
    """The branch of the interpreter that computes `count` planes; it moves on in both tables."""
    integers, floats, body = _BODIES[kernel.kind](kernel)
    advance = f"count--, i += {integers}" + (f", f += {floats}" if floats else "")
    lines = indent(body, " " * 8)
    return f"case {number}:\n    for (; count > 0; {advance}) {{\n{lines}\n    }}\n    break;"


def _loops(kernel: Kernel, body: str) -> str:
    height, width = kernel.shape
    return f"for (int y = 0; y < {height}; y++)\n    for (int x = 0; x < {width}; x++) {{\n{body}\n    }}"


def _at(row: int, stride: Pair = (1, 1)) -> str:
    """Index of position (y, x)."""
    y = row * stride[0]
    return f"{y} * y + " + ("x" if stride[1] == 1 else f"{stride[1]} * x")


def _sum(kernel: Kernel):
    adds = kernel.kind == "add"
    here, there = _at(kernel.row), _at(kernel.source_row, kernel.stride)
    first = 1 if adds else 2
    taps = range(kernel.taps)
    declare = "".join(
        f"const float *const x{t} = arena + i[{t + 1}];\nconst float w{t} = f[{t + first}];\n" for t in taps
    )
    start = f"out[{here}]" if adds else "bias"
    body = f"        const float v = {start}" + "".join(f" + w{t} * x{t}[{there}]" for t in taps) + ";\n"
    body += f"        out[{here}] = v < low ? low : v;"
    head = "float *restrict const out = arena + i[0];\n"
    head += "const float low = f[0];\n" if adds else "const float bias = f[0], low = f[1];\n"
    return kernel.taps + 1, kernel.taps + first, head + declare + _loops(kernel, body)


def _max(kernel: Kernel):
    (height, width), (dy, dx) = kernel.window, kernel.dilation
    there = _at(kernel.source_row, kernel.stride)
    body = f"""\
        float v = in[{there}];
        for (int ky = 0; ky < {height}; ky++)
            for (int kx = 0; kx < {width}; kx++) {{
                const float u = in[{there} + {kernel.source_row * dy} * ky + {dx} * kx];
                v = v < u ? u : v;
            }}
        out[{_at(kernel.row)}] = v;"""
    head = "float *restrict const out = arena + i[0];\nconst float *const in = arena + i[1];\n"
    return 2, 0, head + _loops(kernel, body)


def _clamped(kernel: Kernel):
    (height, width), (bottom, right) = kernel.window, (kernel.source[0] - 1, kernel.source[1] - 1)
    body = f"""\
        float v = -INFINITY;
        for (int ky = 0; ky < {height}; ky++)
            for (int kx = 0; kx < {width}; kx++) {{
                const int r = {kernel.stride[0]} * y + ky + ({kernel.offset[0]});
                const int c = {kernel.stride[1]} * x + kx + ({kernel.offset[1]});
                const int inside = (r < 0 ? 0 : r > {bottom} ? {bottom} : r) * {kernel.source_row};
                const float u = in[inside + (c < 0 ? 0 : c > {right} ? {right} : c)];
                v = v < u ? u : v;
            }}
        out[{_at(kernel.row)}] = v;"""
    head = "float *restrict const out = arena + i[0];\nconst float *const in = arena + i[1];\n"
    return 2, 0, head + _loops(kernel, body)


def _mean(kernel: Kernel):
    height, width = kernel.window
    body = f"""\
const float *const in = arena + i[1];
float columns[{width}] = {{0}}, total = 0;
for (int y = 0; y < {height}; y++)
    for (int x = 0; x < {width}; x++)
        columns[x] += in[{_at(kernel.source_row)}];
for (int x = 0; x < {width}; x++)
    total += columns[x];
arena[i[0]] = total / {height * width};"""
    return 2, 0, body


def _load(kernel: Kernel):
    body = f"        arena[i[0] + {_at(kernel.row)}] = input[i[1] + {_at(kernel.shape[1])}];"
    return 2, 0, _loops(kernel, body)


def _store(kernel: Kernel):
    body = f"        output[i[1] + {_at(kernel.shape[1])}] = arena[i[0] + {_at(kernel.row)}];"
    return 2, 0, _loops(kernel, body)


_BODIES = {
    "sum": _sum,
    "add": _sum,
    "max": _max,
    "clamped": _clamped,
    "mean": _mean,
    "load": _load,
    "store": _store,
}
