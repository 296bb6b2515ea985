"""Results of `bench inference` as a bar chart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UsageError

LABELS = {
    "pytorch_dense": "PyTorch, dense", "onnxruntime_dense": "onnxruntime, dense", "onnx": "ONNX, sparse",
    "c": "C, sparse",
}  # fmt: skip


def check_path(path: Path) -> None:
    """Raises `UsageError` where no chart can be written to `path`, and `MissingExtraError`."""
    kinds = _figure_class()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UsageError(f"--plot {path} must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path} must be a file in a folder that exists")


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib: pip install 'east_plugins[train]'") from error
    return Figure


def bar_chart(result: dict[str, Any], subject: str, path: Path) -> None:
    """Median milliseconds an image, one bar for each batch size, beside the size on disk (C: compiled), both on
    logarithmic scales.

    Raises `UsageError` where `path` cannot be written, and `MissingExtraError`.
    """
    times: dict[int, dict[str, float]] = defaultdict(dict)
    for row in result["rows"]:
        name, _, batch = row["name"].partition("_batch")
        times[int(batch or 1)][name] = row["median_ms"] / int(batch or 1)
    names = list(next(iter(times.values())))
    sizes = [result["sizes"]["c_object" if name == "c" else name] / 1024 for name in names]
    figure = _figure_class()(figsize=(10, 1.2 + 0.25 * len(names) * (len(times) + 1)), layout="constrained")
    figure.suptitle(f"{subject}: {result['nonzeros']:,} of {result['maskable']:,} weights active")
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(times)
    for i, (batch, by_name) in enumerate(times.items()):
        places = [y - 0.4 + height * (i + 0.5) for y in range(len(names))]
        bars = left.barh(places, [by_name[name] for name in names], height, label=f"batch {batch}")
        left.bar_label(bars, fmt="%.3g", padding=3)
    left.legend()
    right.bar_label(right.barh(range(len(names)), sizes, color="gray"), [f"{size:,.0f}" for size in sizes], padding=3)
    left.set_yticks(range(len(names)), [LABELS[name] for name in names])
    left.invert_yaxis()
    for axes, label in ((left, f"ms per image, {result['threads']} thread(s)"), (right, "KiB on disk")):
        axes.set(xscale="log", xlabel=label)
        axes.margins(x=0.2)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path} cannot be written: {' '.join(str(error).split())[:120]}") from error
