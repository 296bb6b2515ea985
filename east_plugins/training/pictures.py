"""The picture of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..ops import figures


class Cell(Protocol):
    """A method at a sparsity over its seeds; accuracies as fractions of 1."""

    @property
    def label(self) -> str: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def accuracies(self) -> list[float]: ...
    @property
    def mean(self) -> float: ...
    @property
    def spread(self) -> float | None: ...
    @property
    def marks(self) -> list[str]: ...


def accuracy(cells: Sequence[Cell], path: Path, chance: float | None, title: str) -> None:
    """Bars of test accuracy, one group a sparsity: mean, standard deviation as a line, every seed as a dot;
    runs that are dead or diverged say so. What has
    sparsity 0 beside others is a line across, and so is chance, None where it is not the same for all.

    Raises `UsageError` where `path` cannot be written, and `MissingExtraError`.
    """
    across = [cell for cell in cells if cell.sparsity == 0] if any(cell.sparsity for cell in cells) else []
    grouped = [cell for cell in cells if cell not in across]
    sparsities = sorted({cell.sparsity for cell in grouped})
    methods = list(dict.fromkeys(cell.label for cell in cells))
    groups = [[cell for cell in grouped if cell.sparsity == sparsity] for sparsity in sparsities]
    figure = figures.figure(max(5.4, 3.4 + sum(0.5 * len(group) + 0.4 for group in groups)), 4.2)
    axes = figure.subplots()
    places, place = [], 0.0
    for group in groups:
        places.append([place + i for i in range(len(group))])
        place += len(group) + 1
    named: set[str] = set()
    for group, xs in zip(groups, places, strict=True):
        for cell, x in zip(group, xs, strict=True):
            label = cell.label if cell.label not in named else None
            named.add(cell.label)
            axes.bar(x, 100 * cell.mean, 0.86, label=label, **figures.filled(methods.index(cell.label)))
            if cell.spread is not None:
                axes.errorbar(x, 100 * cell.mean, 100 * cell.spread, color="black", capsize=4, linewidth=1)
            if cell.marks:
                top = 100 * max(*cell.accuracies, cell.mean + (cell.spread or 0))
                words: dict = dict(rotation=90, ha="center", va="bottom", fontsize=8, textcoords="offset points")
                axes.annotate(", ".join(cell.marks), (x, top), (0, 5), **words)
            dots = [100 * value for value in cell.accuracies]
            axes.plot([x] * len(dots), dots, "o", color="black", markerfacecolor="white", markersize=4)
    for cell in across:
        color = figures.drawn(methods.index(cell.label))["color"]
        axes.axhline(100 * cell.mean, color=color, linewidth=1.5, label=f"{cell.label} (0 %)")
    if chance is not None:
        axes.axhline(100 * chance, color="black", linestyle="--", linewidth=1, label="chance")
    axes.plot([], [], "o", color="black", markerfacecolor="white", markersize=4, label="one seed")
    if any(cell.spread is not None for cell in grouped):
        axes.errorbar([], [], [], color="black", capsize=4, linewidth=1, label="standard deviation")
    axes.set_xticks([statistics.fmean(xs) for xs in places], [f"{s * 100:.6g} %" for s in sparsities])
    highest = max(
        [chance or 0.01, *(value for cell in cells for value in (*cell.accuracies, cell.mean + (cell.spread or 0)))]
    )
    axes.set(xlabel="sparsity", ylabel="test accuracy (%)", ylim=(0, min(100.0, 108 * highest)), title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figures.save(figure, path, "`out`")
