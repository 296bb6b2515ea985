"""Curves as SVG, drawn by hand: they stand in a page of one file and need neither matplotlib nor a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .figures import COLORS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 270, 46, 12, 26, 34
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST_POINTS = 240  #: of a line; more are not told apart


@dataclass(frozen=True)
class Curve:
    """A line with the range that several runs of it lie in: `(x, middle, low, high)`, in the order of x."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


def style(number: int) -> tuple[str, str]:
    """Colour and dashes of series `number`; 28 differ."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def curves(series: Sequence[Curve], title: str, horizontal: str, highest: float | None = None) -> str:
    """A picture of lines over x from 0, y from 0 on, each with its range as a band; `highest` y: by default the data's.

    Lines are styled by their place in `series`. Values that are not finite are left out.
    """
    points = [[p for p in _thinned(curve.points) if all(map(math.isfinite, p))] for curve in series]
    right = max((p[0] for some in points for p in some), default=1) or 1
    top = highest or max((p[3] for some in points for p in some), default=1) or 1
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="15" class="title">{escape(title)}</text>',
    ]

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(y, top) / top:.1f}"

    for tick in ticks(top):
        (x, y), end = place(0, tick).split(","), place(right, tick).split(",")[0]
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(right):
        x = place(tick, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(horizontal)}</text>')
    for number, (curve, some) in enumerate(zip(series, points, strict=True)):
        if not some:
            continue
        color, dash = style(number)
        if any(low < high for _, _, low, high in some):
            band = [place(x, high) for x, _, _, high in some] + [place(x, low) for x, _, low, _ in reversed(some)]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.15"/>')
        line = " ".join(place(x, middle) for x, middle, _, _ in some)
        dashes = f' stroke-dasharray="{dash}"' * bool(dash)
        told = f"<title>{escape(curve.label)}: {some[-1][1]:.4g} at {some[-1][0]:g}</title>"
        kind = f'fill="none" stroke="{color}" stroke-width="1.8"{dashes}'
        dot = f'<circle cx="{line.split(",")[0]}" cy="{line.split(",")[1]}" r="3" fill="{color}">{told}</circle>'
        parts.append(f'<polyline points="{line}" {kind}>{told}</polyline>' if len(some) > 1 else dot)
    return "".join([*parts, "</svg>"])


def swatch(number: int) -> str:
    """A short piece of the line of series `number`, for a legend."""
    color, dash = style(number)
    dashes = f' stroke-dasharray="{dash}"' * bool(dash)
    line = f'<line x1="0" y1="5" x2="26" y2="5" stroke="{color}" stroke-width="2.5"{dashes}/>'
    return f'<svg class="swatch" viewBox="0 0 26 10">{line}</svg>'


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to `highest`, four to eight of them."""
    step = 10 ** math.floor(math.log10(highest / 4))
    step = next(step * times for times in (1, 2, 5, 10) if highest / (step * times) <= 6)
    return [round(i * step, 12) for i in range(int(highest / step + 1e-9) + 1)]


def _thinned(points: Sequence[tuple[float, float, float, float]]) -> Sequence[tuple[float, float, float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
