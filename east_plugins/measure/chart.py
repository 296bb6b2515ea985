"""Results of benchmarks as pictures."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..ops import figures

LABELS = {
    "pytorch_dense": "PyTorch, dense", "onnxruntime_dense": "onnxruntime, dense", "onnx": "ONNX, sparse",
    "c": "C, sparse",
}  # fmt: skip


def density_chart(result: dict[str, Any], subject: str, path: Path, relative: bool = False) -> None:
    """Milliseconds of a step against density, both logarithmic, with the limit of the arithmetic, of `sweep`.

    `relative`: as shares of the dense step of the same rounds, which a machine's other work leaves nearly alone.

    Raises `UsageError` where `path` cannot be written, and `MissingExtraError`.
    """
    rows = sorted(result["rows"], key=lambda row: row["density"])
    densities = [row["density"] for row in rows]
    ones = [row["median_ms"]["dense, masked"] if relative else 1 for row in rows]
    figure = figures.figure(7, 4.4)
    axes = figure.subplots()
    for i, name in enumerate(rows[0]["median_ms"]):
        shares = [row["median_ms"][name] / one for row, one in zip(rows, ones, strict=True)]
        axes.plot(densities, shares, label=name, **figures.drawn(i))
    limits = [row["limit_ms"] / one for row, one in zip(rows, ones, strict=True)]
    axes.plot(densities, limits, "k--", linewidth=1, label="arithmetic alone")
    about = f"{subject}, {result['masks']} masks, batch {result['batch_size']}, {result['threads']} thread(s)"
    label = "a training step, in dense steps" if relative else "ms a training step"
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel=label, title=about)
    axes.grid(which="major", color="#DDDDDD")
    axes.legend(frameon=False)
    figures.save(figure, path, "`plot`")


def bar_chart(result: dict[str, Any], subject: str, path: Path) -> None:
    """Milliseconds an image, one bar for each batch size, median with the range of the rounds, beside the size on disk
    (C: compiled), both on logarithmic scales.

    Raises `UsageError` where `path` cannot be written, and `MissingExtraError`.
    """
    times: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for row in result["rows"]:
        name, _, batch = row["name"].partition("_batch")
        per_image = int(batch or 1)
        times[per_image][name] = [row[f"{what}_ms"] / per_image for what in ("median", "min", "max")]
    names = list(next(iter(times.values())))
    sizes = [result["sizes"]["c_object" if name == "c" else name] / 1024 for name in names]
    figure = figures.figure(10, 1.4 + 0.25 * len(names) * (len(times) + 1))
    share = f"{result['nonzeros']:,} of {result['maskable']:,} weights active"
    figure.suptitle(f"Inference of {subject}, {share}\nbars: medians; lines: fastest to slowest round", fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(times)
    for i, (batch, by_name) in enumerate(times.items()):
        places = [y - 0.4 + height * (i + 0.5) for y in range(len(names))]
        median, low, high = zip(*(by_name[name] for name in names), strict=True)
        ranges = [[m - a for m, a in zip(median, low, strict=True)], [b - m for m, b in zip(median, high, strict=True)]]
        bars = left.barh(
            places, median, height, label=f"batch {batch}", xerr=ranges, error_kw={"lw": 1}, **figures.filled(i)
        )
        left.bar_label(bars, [f"{value:.3g}" for value in median], padding=3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(times), frameon=False)
    grey = right.barh(range(len(names)), sizes, color="#7F7F7F")
    right.bar_label(grey, [f"{size:,.0f}" for size in sizes], padding=3)
    left.set_yticks(range(len(names)), [LABELS[name] for name in names])
    left.invert_yaxis()
    for axes, label in ((left, f"ms an image, {result['threads']} thread(s)"), (right, "KiB on disk")):
        axes.set(xscale="log", xlabel=label)
        axes.margins(x=0.2)
    figures.save(figure, path, "`plot`")
