"""A study's tables and pictures: CSV files, Markdown, and one picture for each question."""

from __future__ import annotations

import base64
import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..ops import figures, files
from ..ops import text as tables
from ..ops.doing import doing
from ..training.images import Kept
from ..training.report import Report
from ..training.study import Cell
from . import study
from .ranks import Ranks
from .study import EXPECTED, Pairs

Done = Sequence[tuple[Cell, Mapping[str, Any]]]


def write(
    out: Path,
    done: Done,
    low: float,
    title: str,
    say: Callable[[str], None] = lambda line: None,
    choices_every: int | None = None,
) -> str:
    """Everything that finished runs say, in files in `out`; returns the text of `study.md`.

    Pictures that need more than one period, density or criterion are left out where there is one only. With
    `choices_every` also how alike choices are over time (`study.choices_over_time`).
    """
    records = write_runs(out, done)
    periods = sorted({record["period"] for record in records if record["period"]})
    parts = [accuracy_table(records)]
    pictures = []
    for period in periods:
        name = f"accuracy-every{period}.png" if len(periods) > 1 else "accuracy.png"
        by_density(records, period, out / name, title)
        pictures.append((name, f"test accuracy against density, an update every {period} steps"))
    if len(periods) > 1:
        by_period(records, "test_accuracy", "test accuracy (%)", out / "period.png", title)
        by_period(records, "itop_rate", "ITOP rate (%)", out / "itop.png", title)
        pictures.append(("period.png", "test accuracy against the update period"))
        pictures.append(("itop.png", "share of weights that were active at least once, against the update period"))
    found = study.average_ranks(done, low)
    if found:
        parts.append(_ranks(out, found, pictures, say))
    kept: Kept = {}
    similar(out, done, periods, pictures, kept)
    if choices_every is not None:
        over_time(out, done, choices_every, pictures, kept, say)
    text = "\n".join([f"# {title}\n", *parts, *(f"![{words}]({name})\n" for name, words in pictures)])
    files.write_atomically(out / "study.md", text)
    todo, pairs = [cell.job for cell, _ in done], [(cell.job, dict(summary)) for cell, summary in done]
    Report(out, todo, title).write(pairs, first=page(out, parts, pictures))
    return text


def page(out: Path, parts: Sequence[str], pictures: Sequence[tuple[str, str]]) -> list[str]:
    """The study's tables and pictures as parts of a page that needs no other file, and links to the figures beneath."""
    found = ["<h2>Where to prune</h2>", *(f"<pre>{escape(part)}</pre>" for part in parts)]
    for name, words in pictures:
        data = base64.b64encode((out / name).read_bytes()).decode()
        found.append(f'<h3>{escape(words)}</h3><img alt="{escape(words)}" src="data:image/png;base64,{data}">')
    links = ", ".join(f'<a href="{path.name}">{path.name}</a>' for path in sorted(out.glob("*.csv")))
    return [*found, f'<p class="note">The figures beneath: {links}</p>']


def write_runs(out: Path, done: Done) -> list[dict[str, Any]]:
    """`study.csv`: one line a run; returns its records."""
    records = study.rows(done)
    _csv(out / "study.csv", list(records[0]), [list(record.values()) for record in records])
    return records


def accuracy_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy in %, mean and standard deviation over seeds: criteria down, densities across."""
    means = study.means(records, "test_accuracy")
    densities = sorted({density for _, _, density, _ in means})
    kinds = list(dict.fromkeys((criterion, growth, period) for criterion, growth, _, period in means))
    lines = []
    for criterion, growth, period in kinds:
        cells = [means.get((criterion, growth, density, period)) for density in densities]
        shown = ["" if c is None else f"{100 * c[0]:.1f}" + (f" +- {100 * c[1]:.1f}" if c[1] else "") for c in cells]
        lines.append([criterion, growth or "-", period or "-", *shown])
    head = ["criterion", "growth", "every", *(f"{100 * density:.4g} %" for density in densities)]
    return f"Test accuracy in %, mean +- standard deviation over seeds, by density.\n\n{tables.markdown(head, lines)}"


def _ranks(out: Path, found: Mapping[str, Ranks], pictures: list[tuple[str, str]], say: Callable[[str], None]) -> str:
    names = sorted(next(iter(found.values())).average, key=lambda name: next(iter(found.values())).average[name])
    lines = [[part, name, each.average[name], each.settings, each.distance, each.behind(name)]
             for part, each in found.items() for name in names]  # fmt: skip
    _csv(out / "ranks.csv", ["settings", "criterion", "average_rank", "count", "critical_distance", "behind"], lines)
    for part, each in found.items():
        name = f"ranks-{'all' if 'all' in part else 'low' if 'up' in part else 'high'}.png"
        if diagram(each, out / name, f"{part}, {each.settings} settings"):
            pictures.append((name, f"average ranks, {part}"))
        else:
            say("no critical-distance diagrams: they need scikit-posthocs, pip install 'east_plugins[study]'")
            break
    shown = [f"{part} ({each.settings} settings, CD {each.distance:.2f})" for part, each in found.items()]
    rows = [[name, *(f"{e.average[name]:.2f}" + (" behind" if e.behind(name) else "") for e in found.values())]
            for name in names]  # fmt: skip
    words = (
        "Average ranks, 1 the best, by mean test accuracy in each setting of growth, density and period; `behind`: "
        "significantly behind the best one, by at least the critical distance CD (Nemenyi, 0.05)."
    )
    return f"{words}\n\n{tables.markdown(['criterion', *shown], rows)}"


def _settings(done: Done) -> Iterator[tuple[str, float, int, list[Cell]]]:
    """Growth, density and period of every setting that has runs of two criteria or more, with all its cells."""
    found: dict[tuple[str, float, int], list[Cell]] = {}
    for cell, _ in done:
        if not cell.baseline:
            found.setdefault((cell.growth, cell.density, cell.period), []).append(cell)
    growths = list(dict.fromkeys(growth for growth, *_ in found))
    for key, cells in sorted(found.items(), key=lambda item: (growths.index(item[0][0]), *item[0][1:])):
        if len({cell.criterion for cell in cells}) > 1:
            yield *key, cells


def over_time(
    out: Path, done: Done, every: int, pictures: list[tuple[str, str]], kept: Kept, say: Callable[[str], None]
) -> None:
    """`choices.csv`, and a picture for each setting: similarity of choices at every `every`-th update."""
    lines = []
    for growth, density, period, cells in _settings(done):
        words = f"{growth} growth, density {density:g}, an update every {period} steps"
        say(f"choices   {words}: every criterion's run is trained again")
        records = study.choices_over_time(cells, every, kept)
        if not records:
            continue
        lines += [[growth, density, period, *record.values()] for record in records]
        name = f"choices-{growth.replace(':', '_')}-{density:g}-every{period}.png"
        by_step(records, out / name, f"Jaccard index of weights chosen for removal over time, {words}")
        pictures.append((name, f"Jaccard index of weights chosen for removal over time, {words}"))
    if lines:
        head = ["growth", "density", "period", "criterion", "other", "step", "jaccard", "expected"]
        _csv(out / "choices.csv", head, lines)


def similar(out: Path, done: Done, periods: Sequence[int], pictures: list[tuple[str, str]], kept: Kept) -> None:
    """Similarity of choices and final masks, at every density and growth of the first period."""
    lines: list[list[Any]] = []
    shares: list[list[Any]] = []
    for growth, density, period, cells in _settings(done):
        if period != periods[0]:
            continue
        words = f"{growth} growth, density {density:g}"
        doing(f"similarity of choices and masks, {words}")
        choices, ends = study.choice_similarity(cells, kept), study.end_similarity(cells, kept)
        for kind, pairs in (("choice", choices), ("masks", ends)):
            if not pairs:  # all criteria average over steps
                continue
            name = f"{kind}-{growth.replace(':', '_')}-{density:g}.png"
            what = "weights chosen for removal in one state" if kind == "choice" else "masks at the end"
            matrix(pairs, out / name, f"Jaccard index of {what}\n{words}")
            pictures.append((name, f"Jaccard index of {what}, {words}"))
            lines += [[kind, growth, density, a, b, i, value]
                      for (a, b), some in pairs.items() for i, value in enumerate(some)]  # fmt: skip
        shares += [[growth, density, *each.values()] for each in study.common(cells)]
    if lines:
        _csv(out / "jaccard.csv", ["of", "growth", "density", "a", "b", "number", "jaccard"], lines)
        head = ["seed", "kept_by_all", "removed_by_all", "kept_by_all_of_random", "removed_by_all_of_random"]
        _csv(out / "common.csv", ["growth", "density", *head], shares)
        common(shares, out / "common.png")
        pictures.append(("common.png", "share of weights that all criteria keep, or remove"))


def _csv(path: Path, head: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([head, *lines])
    files.write_atomically(path, text.getvalue())


# ---------------------------------------------------------------------- pictures


def by_density(records: Sequence[Mapping[str, Any]], period: int, path: Path, title: str) -> None:
    """Test accuracy against density, a panel for each growth; baselines in each of them."""
    found = study.means(records, "test_accuracy")
    growths = list(dict.fromkeys(growth for _, growth, _, _ in found if growth))
    criteria = list(dict.fromkeys(criterion for criterion, *_ in found))
    figure = figures.figure(0.9 + 4.2 * len(growths), 3.8)
    panels = figure.subplots(1, len(growths), squeeze=False, sharey=True)[0]
    for axes, growth in zip(panels, growths, strict=True):
        for criterion in criteria:
            points = sorted((density, *value) for (name, g, density, p), value in found.items()
                            if name == criterion and g in ("", growth) and p in (0, period))  # fmt: skip
            _curve(axes, criterion, criteria.index(criterion), points)
        axes.set(xscale="log", xlabel="density", title=f"{growth} growth")
        ticks = sorted({density for name, _, density, _ in found if name != "dense"})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=60, fontsize=8)
        axes.minorticks_off()
    panels[0].set_ylabel("test accuracy (%)")
    _finish(figure, panels[-1], path, title)


def _curve(axes: Any, name: str, number: int, points: Sequence[tuple[float, float, float]]) -> None:
    """Mean with standard deviation; of the dense network, which has one density, a line across."""
    if name == "dense":
        axes.axhline(100 * points[0][1], color="black", linestyle="--", linewidth=1, label=name)
        return
    style = {**figures.drawn(number), **({"linestyle": ":"} if name == "static" else {})}
    x, mean, spread = zip(*points, strict=True)
    axes.errorbar(x, [100 * v for v in mean], [100 * v for v in spread], label=name, capsize=2, linewidth=1.2, **style)


def by_period(records: Sequence[Mapping[str, Any]], value: str, label: str, path: Path, title: str) -> None:
    """A column against the update period, a panel for each growth and density."""
    found = study.means(records, value)
    kinds = list(dict.fromkeys((g, d) for name, g, d, _ in found if g))
    criteria = list(dict.fromkeys(criterion for criterion, *_ in found))
    growths, densities = list(dict.fromkeys(g for g, _ in kinds)), sorted({d for _, d in kinds})
    figure = figures.figure(0.9 + 3.2 * len(densities), 0.4 + 3 * len(growths))
    panels = figure.subplots(len(growths), len(densities), squeeze=False, sharex=True)
    for line, growth in zip(panels, growths, strict=True):
        for axes, density in zip(line, densities, strict=True):
            for criterion in criteria:
                points = sorted((p, *v) for (name, g, d, p), v in found.items()
                                if (name, g, d) == (criterion, growth, density))  # fmt: skip
                if points:
                    _curve(axes, criterion, criteria.index(criterion), points)
                elif value == "test_accuracy" and (still := found.get((criterion, "", density, 0))):
                    axes.axhline(100 * still[0], color="black", linestyle=":", linewidth=1, label=criterion)
            ticks = sorted({p for *_, p in found if p})
            axes.set(xscale="log", title=f"{growth} growth, density {density:g}")
            axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60, fontsize=8)
            axes.minorticks_off()
        line[0].set_ylabel(label)
    for axes in panels[-1]:
        axes.set_xlabel("steps between updates")
    _finish(figure, panels[0][-1], path, title)


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figures.save(figure, path, "`out`")


def diagram(found: Ranks, path: Path, title: str) -> bool:
    """The critical-distance diagram; False where scikit-posthocs is not installed."""
    try:
        import pandas
        from scikit_posthocs import critical_difference_diagram
    except ImportError:
        return False
    names = list(found.average)
    p = pandas.DataFrame([[found.p_value(a, b) if a != b else 1.0 for b in names] for a in names], names, names)
    figure = figures.figure(6.6, 0.9 + 0.22 * len(names))
    axes = figure.subplots()
    critical_difference_diagram(found.average, p, ax=axes, label_fmt_left="{label} ({rank:.2f})",
                                label_fmt_right="({rank:.2f}) {label}")  # fmt: skip
    axes.set_title(f"average rank, 1 the best; {title}; CD {found.distance:.2f}", fontsize=9)
    figures.save(figure, path, "`out`")
    return True


def matrix(pairs: Pairs, path: Path, title: str) -> None:
    """Mean similarities over seeds as a picture of a table; what is expected of random sets in the last column."""
    down = list(dict.fromkeys(a for a, _ in pairs))
    across = list(dict.fromkeys(b for _, b in pairs))
    across.sort(key=lambda name: name == EXPECTED)
    figure = figures.figure(1.9 + 0.75 * len(across), 1.4 + 0.5 * len(down))
    axes = figure.subplots()
    values = [[statistics.fmean(pairs[a, b]) if pairs.get((a, b)) else float("nan") for b in across] for a in down]
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value > 0.6 else "k")
    axes.set_xticks(range(len(across)), across, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(down)), down, fontsize=8)
    axes.set_title(title, fontsize=9)
    figures.save(figure, path, "`out`")


def by_step(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel for the run of each criterion: similarity of its choice and those of the others, by step."""
    names = list(dict.fromkeys(record["criterion"] for record in records))
    across = min(4, len(names))
    figure = figures.figure(0.9 + 2.6 * across, 0.7 + 2.4 * -(-len(names) // across))
    grid = figure.subplots(-(-len(names) // across), across, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        mine = [record for record in records if record["criterion"] == name]
        for other in (other for other in names if other != name):
            points = [(record["step"], record["jaccard"]) for record in mine if record["other"] == other]
            style = {**figures.drawn(names.index(other)), "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=other, linewidth=1.2, **style)
        random = dict((record["step"], record["expected"]) for record in mine)
        axes.plot(list(random), list(random.values()), color="black", linestyle=":", linewidth=1, label="random sets")
        axes.set(title=f"in the run of {name}", xlabel="step", ylim=(0, 1.05))
        axes.tick_params(labelbottom=True)  # below some panels there is none
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("Jaccard index")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in (*names, "random sets") if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figures.save(figure, path, "`out`")


def common(shares: Sequence[Sequence[Any]], path: Path) -> None:
    """Bars of the shares that all criteria keep or remove, beside what is expected of random masks."""
    kinds = list(dict.fromkeys((growth, density) for growth, density, *_ in shares))
    figure = figures.figure(3.4 + 0.55 * len(kinds), 3.6)
    axes = figure.subplots()
    for k, label in enumerate(["kept by all", "removed by all"]):
        for i, kind in enumerate(kinds):
            some = [line for line in shares if (line[0], line[1]) == kind]
            value, random = (100 * statistics.fmean(line[at + k] for line in some) for at in (3, 5))
            axes.bar(i + 0.36 * k, value, 0.34, label=label if i == 0 else None, **figures.filled(k))
            axes.plot([i + 0.36 * k - 0.17, i + 0.36 * k + 0.17], [random] * 2, color="black", linewidth=2,
                      label="random masks" if i == k == 0 else None)  # fmt: skip
    axes.set_xticks([i + 0.18 for i in range(len(kinds))], [f"{g} {d:g}" for g, d in kinds], rotation=60, fontsize=8)
    axes.set(xlabel="growth and density", ylabel="share (%)", ylim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figures.save(figure, path, "`out`")
