"""Kernels of the exported C file, one for each combination of shapes, stride and number of taps."""

from __future__ import annotations

from textwrap import indent
from typing import NamedTuple

from .node import Pair


class Kernel(NamedTuple):
    """What is done for a plane, and the constants it is done with.

    `kind` is sum, add (to what is there), max, clamped (max with indices kept inside the source), mean, map (`function`
    of every number), dot (of `taps` pairs of sources), peak (of `taps` sources), nearest, gather, table, load (from the
    input) or store (to the output). Planes have `shape` and rows `row` apart, sources likewise; the second source of a
    pair is read with `other_row` and `other_stride`.
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
    other_row: int = 1
    other_stride: Pair = (1, 1)
    function: str = ""


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


#: Functions of one number `u` as C expressions.
FUNCTIONS = {
    "sigmoid": "1.0f / (1.0f + expf(-u))",
    "silu": "u / (1.0f + expf(-u))",
    "hardsigmoid": "(u <= -3.0f ? 0.0f : u >= 3.0f ? 6.0f : u + 3.0f) / 6.0f",
    "hardswish": "u * (u <= -3.0f ? 0.0f : u >= 3.0f ? 6.0f : u + 3.0f) / 6.0f",
    "tanh": "tanhf(u)",
    "gelu": "0.5f * u * (1.0f + erff(u * 0.70710678f))",
    "gelu_tanh": "0.5f * u * (1.0f + tanhf(0.79788456f * (u + 0.044715f * u * u * u)))",
    "relu6": "u < 0.0f ? 0.0f : u > 6.0f ? 6.0f : u",
    "exp": "expf(u)",
    "log": "logf(u)",
    "rsqrt": "1.0f / sqrtf(u)",
    "reciprocal": "1.0f / u",
}


def _map(kernel: Kernel):
    there = _at(kernel.source_row)
    body = f"        const float u = in[{there}];\n        out[{_at(kernel.row)}] = {FUNCTIONS[kernel.function]};"
    head = "float *restrict const out = arena + i[0];\nconst float *const in = arena + i[1];\n"
    return 2, 0, head + _loops(kernel, body)


def _dot(kernel: Kernel):
    here = _at(kernel.row)
    first, second = _at(kernel.source_row, kernel.stride), _at(kernel.other_row, kernel.other_stride)
    inner = indent(_loops(kernel, f"        out[{here}] += a[{first}] * b[{second}];"), "    ")
    body = "float *restrict const out = arena + i[0];\n" + _loops(kernel, f"        out[{here}] = 0.0f;")
    if kernel.taps:
        body += f"\nfor (int t = 0; t < {kernel.taps}; t++) {{\n"
        body += "    const float *const a = arena + i[2 * t + 1], *const b = arena + i[2 * t + 2];\n" + inner + "\n}"
    return 2 * kernel.taps + 1, 0, body


def _peak(kernel: Kernel):
    here, there = _at(kernel.row), _at(kernel.source_row)
    inner = f"        const float u = in[{there}];\n        out[{here}] = out[{here}] < u ? u : out[{here}];"
    body = "float *restrict const out = arena + i[0];\n" + _loops(kernel, f"        out[{here}] = -INFINITY;")
    body += f"\nfor (int t = 1; t <= {kernel.taps}; t++) {{\n    const float *const in = arena + i[t];\n"
    return kernel.taps + 1, 0, body + indent(_loops(kernel, inner), "    ") + "\n}"


def _nearest(kernel: Kernel):
    there = f"{kernel.source_row} * (y / {kernel.window[0]}) + x / {kernel.window[1]}"
    body = f"        arena[i[0] + {_at(kernel.row)}] = arena[i[1] + {there}];"
    return 2, 0, _loops(kernel, body)


def _gather(kernel: Kernel):
    height, width = kernel.shape
    place = f"const int32_t place = i[1 + {_at(width)}];"
    body = f"        {place}\n        arena[i[0] + {_at(kernel.row)}] = place < 0 ? 0.0f : arena[place];"
    return 1 + height * width, 0, _loops(kernel, body)


def _table(kernel: Kernel):
    height, width = kernel.shape
    return 1, height * width, _loops(kernel, f"        arena[i[0] + {_at(kernel.row)}] = f[{_at(width)}];")


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
    "map": _map,
    "dot": _dot,
    "peak": _peak,
    "nearest": _nearest,
    "gather": _gather,
    "table": _table,
    "load": _load,
    "store": _store,
}
