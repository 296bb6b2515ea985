"""Pictures by matplotlib, which is imported here alone: figures, colours, and files there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, UsageError
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Told apart with colour-blindness (Okabe and Ito 2008); black and yellow are left for lines and for nothing.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; raises `MissingExtraError`."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'east_plugins[train]'") from error
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def filled(number: int) -> dict[str, Any]:
    """Colour and hatch of the bars of series `number`; 49 differ, neighbours in colour."""
    return {
        "facecolor": COLORS[number % len(COLORS)],
        "hatch": HATCHES[number // len(COLORS) % len(HATCHES)],
        "edgecolor": "white",
        "linewidth": 0.0,
    }


def drawn(number: int) -> dict[str, Any]:
    """Colour and marker of the line of series `number`; 49 differ, neighbours in both."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
        "markersize": 5,
    }


def check_path(path: Path, what: str) -> None:
    """Raises `UsageError`, naming it `what`, where no picture can be written to `path`, and `MissingExtraError`."""
    kinds = figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UsageError(f"{what} {path} must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    if not path.parent.is_dir():
        raise UsageError(f"{what} {path} must be a file in a folder that exists")


def save(picture: Figure, path: Path, what: str) -> None:
    """Write a picture; raises `UsageError`, naming it `what`, where `path` cannot be written."""
    try:
        with replacing(path) as unfinished:
            picture.savefig(unfinished, dpi=150)
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be written: {' '.join(str(error).split())[:120]}") from error
