"""The paper's Figures 2, 3 and 5 from runs: accuracy against sparsity, and what passes through networks over time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..ops import figures
from ..training import runs
from .analysis import run_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, COLUMNS = 5.2, 3.6, 3  #: of a panel, inches; panels in a row
LINES = ("-", "--", ":", "-.")  #: one for each sparsity

#: What is drawn over epochs: title, and the value of a line of `metrics.jsonl`, None where it has none.
_OVER_TIME: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "positive inputs of the ReLUs (%)": lambda line: _percent(line.get("positive_preactivations")),
    "gradient flow: sum of the layers' norms": lambda line: line.get("gradient_flow"),
    "ITOP rate (%)": lambda line: _percent(line.get("itop_rate")),
    "active weights on a path (%)": lambda line: _percent(line["effective_density"] / (line["density"] or 1)),
    "layers that nothing passes through": lambda line: _collapsed(line),
}


def plot(report: Mapping[str, Any], folders: Sequence[Path], path: Path) -> None:
    """Write a picture of the runs of a report of `analyze`, which was made from `folders`.

    Runs of one method and sparsity are a line: the median over seeds, and a band from the lowest to the highest. A
    method has one colour throughout, a sparsity one kind of line.
    What no run has is no panel: positive inputs and gradient flow over time are recorded by `train --signals`. Where
    DyReLU is phased out is grey. Raises `UsageError` where there is nothing to draw or `path` cannot be written.
    """
    groups = _groups(report, [folder for folder in run_folders(folders) if folder.is_dir()])
    styles = _styles(groups)
    panels = [*_accuracy(report), *_layers(groups, styles)]
    panels += [panel for title, value in _OVER_TIME.items() for panel in _over_time(groups, styles, title, value)]
    if not panels:
        raise UsageError(f"`plot` {path}: the runs hold nothing that could be drawn yet")
    rows = -(-len(panels) // COLUMNS)
    columns = min(len(panels), COLUMNS)
    figure = figures.figure(WIDTH * columns, HEIGHT * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for draw, place in zip(panels, axes, strict=False):
        draw(place)
    for place in axes[len(panels) :]:
        place.axis("off")
    named = [zip(*place.get_legend_handles_labels(), strict=True) for place in axes if place.get_legend() is None]
    handles = {text: handle for pairs in named for handle, text in pairs}
    if any(len(entries) > 1 for entries, _ in groups.values()):
        handles["from the lowest to the highest seed"] = axes[0].fill_between([], [], [], color="0.7", linewidth=0)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figures.save(figure, path, "`plot`")


def _styles(groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """Colour by method, and kind of line by sparsity."""
    firsts = {name: entries[0] for name, (entries, _) in groups.items()}
    kinds = {name: (entry["method"], _sparsity(entry) if entry["density"] else 0.0) for name, entry in firsts.items()}
    methods = list(dict.fromkeys(method for method, _ in kinds.values()))
    sparsities = sorted({sparsity for _, sparsity in kinds.values()})
    return {
        name: {
            "color": figures.drawn(methods.index(method))["color"],
            "linestyle": LINES[sparsities.index(sparsity) % len(LINES)],
            "linewidth": 1.5,
        }
        for name, (method, sparsity) in kinds.items()
    }


Group = tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]
Panel = Callable[["Axes"], None]


def _groups(report: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Group]:
    """Entries of the report, and lines of `metrics.jsonl`, of all seeds of a method at a sparsity."""
    found: dict[str, Group] = {}
    known = {entry["run"]: entry for entry in report["runs"]}
    for folder in folders:
        entry = known[str(folder)]
        sparsity = f" {_sparsity(entry):g} %" if entry["density"] else ""
        entries, metrics = found.setdefault(f"{entry['method']}{sparsity}", ([], []))
        entries.append(entry)
        metrics.append(runs.read_metrics(folder))
    return found


def _accuracy(report: Mapping[str, Any]) -> list[Panel]:
    """Figure 2: test accuracy against sparsity, where one method was trained at several."""
    points: dict[str, dict[float, list[float]]] = {}
    methods = list(dict.fromkeys(entry["method"] for entry in report["runs"]))
    for entry in report["runs"]:
        if entry["test_accuracy"] is not None and entry["density"]:
            some = points.setdefault(entry["method"], {}).setdefault(_sparsity(entry), [])
            some.append(100 * entry["test_accuracy"])
    sparsities = sorted({sparsity for some in points.values() for sparsity in some})
    if not any(len(some) > 1 for some in points.values()):
        return []

    def draw(axes: Axes) -> None:
        for method, some in points.items():
            style = figures.drawn(methods.index(method))
            _band(axes, method, {sparsities.index(s): values for s, values in some.items()}, style)
        axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
        axes.set(title="test accuracy (%)", xlabel="sparsity (%)", ylim=(0, None))
        axes.legend(frameon=False)  # of its own: a line is a method here

    return [draw]


def _layers(groups: Mapping[str, Group], styles: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """Figure 3, left: positive inputs of every ReLU at the end."""
    shares = {name: [entry["relus"] for entry in entries if entry["relus"]] for name, (entries, _) in groups.items()}
    if not any(shares.values()):
        return []

    def draw(axes: Axes) -> None:
        for name, some in shares.items():
            longest = max(map(len, some), default=0)
            by_layer = {n: [100 * relus[n] for relus in some if n < len(relus)] for n in range(longest)}
            _band(axes, name, {n + 1: values for n, values in by_layer.items()}, styles[name])
        axes.set(title="positive inputs by ReLU, at the end (%)", xlabel="ReLU, from input to output", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)

    return [draw]


def _over_time(
    groups: Mapping[str, Group],
    styles: Mapping[str, Mapping[str, Any]],
    title: str,
    value: Callable[[Mapping[str, Any]], float | None],
) -> list[Panel]:
    """Figures 3, right, and 5: a figure over the epochs."""
    points: dict[str, dict[int, list[float]]] = {}
    for name, (_, metrics) in groups.items():
        for line in (line for lines in metrics for line in lines):
            if (found := value(line)) is not None:
                points.setdefault(name, {}).setdefault(line["epoch"], []).append(found)
    if not points:
        return []

    def draw(axes: Axes) -> None:
        for name in groups:
            _band(axes, name, points.get(name, {}), styles[name])
        if phase := _phase(groups):
            axes.axvspan(*phase, color="0.9", zorder=0, label="DyReLU is phased out")
        highest = max(max(values) for some in points.values() for values in some.values())
        axes.set(title=title, xlabel="epoch", ylim=(0, 1.05 * highest) if highest else (-0.05, 1))  # a line of zeros
        axes.locator_params(axis="both" if title.startswith("layers") else "x", integer=True)

    return [draw]


def _phase(groups: Mapping[str, Group]) -> tuple[int, int] | None:
    """First and last epoch at whose end DyReLU was on the way out, over all runs that phase it out."""
    fading = [
        line["epoch"] for _, metrics in groups.values() for lines in metrics for line in lines if 0 < line["beta"] < 1
    ]
    return (min(fading), max(fading)) if fading else None


def _band(axes: Axes, label: str, points: Mapping[Any, Sequence[float]], style: Mapping[str, Any]) -> None:
    """The median of several values at every x, and the range that they lie in."""
    some = {x: values for x, values in sorted(points.items()) if values}
    if not some:
        return
    style = {"marker": "o" if len(some) == 1 else None, "markersize": 4, **style}  # a point alone is no line
    axes.plot(list(some), [statistics.median(values) for values in some.values()], label=label, **style)
    lows, highs = [min(values) for values in some.values()], [max(values) for values in some.values()]
    axes.fill_between(list(some), lows, highs, color=style["color"], alpha=0.18, linewidth=0)


def _sparsity(entry: Mapping[str, Any]) -> float:
    """In percent, to three digits of the density: whole numbers of weights make others of it."""
    return round(100 * (1 - float(f"{entry['density']:.3g}")), 6)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _collapsed(line: Mapping[str, Any]) -> float | None:
    layers = line.get("layers")
    return None if layers is None else float(sum(on == 0 for _, on in layers.values()))
