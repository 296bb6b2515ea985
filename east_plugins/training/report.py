"""The page of a comparison: table, curves, layers that nothing passes through, and the settings that differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..ops import svg
from . import runs, table
from .jobs import Job, shown
from .verdict import verdict

REPORT = "report.html"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1240px; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .5em } h3 { font-size: 1em }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3em .9em .3em 0; border-bottom: 1px solid #ddd; white-space: nowrap }
td.words { white-space: normal } tr.bad td { background: #fdf1ec }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(370px, 1fr)); gap: 1em } svg { width: 100% }
svg text { font-size: 11px; fill: #444 } svg text.title { font-size: 12.5px; font-weight: 600; fill: #1a1a1a }
svg .grid { stroke: #e4e4e4 } .legend { columns: 2 24em; padding: 0; list-style: none; font-size: .9em }
svg.swatch { width: 26px; height: 10px; margin-right: .6em } .note { color: #555; font-size: .92em }
"""

Lines = list[dict[str, Any]]


class Report:
    """`report.html` in the folder of a comparison, one file that needs no server; written anew as runs finish.

    What a finished run's folder holds is read once.
    """

    def __init__(self, out: Path, todo: Sequence[Job], title: str):
        self.out, self.todo, self.title = out, todo, title
        self.metrics: dict[Path, Lines] = {}

    def write(
        self, summaries: Sequence[tuple[Job, dict[str, Any]]], failed: Sequence[str] = (), first: Sequence[str] = ()
    ) -> None:
        """The page of the runs so far; `failed` are words on those that failed, `first` parts of HTML that lead."""
        order = {job.out: i for i, job in enumerate(self.todo)}
        pairs = sorted(summaries, key=lambda pair: order[pair[0].out])
        for job, _ in pairs:
            if job.out not in self.metrics:
                self.metrics[job.out] = _metrics(job.out)
        finished = sum(not summary.get("unfinished") for _, summary in pairs)
        state = f"{finished} of {len(self.todo)} runs finished" + f", {len(failed)} failed" * bool(failed)
        parts = [
            f'<p class="note">{state}; in {escape(str(self.out))}</p>',
            *([_section("Failed"), _list(failed)] if failed else []),
            *first,
            *(self._table(pairs) if pairs else []),
            *self._curves(pairs),
            *self._layers(pairs),
            *self._settings(pairs),
        ]
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(self.title)}</title>'
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        page = f"{head}{view}<style>{_STYLE}</style><h1>{escape(self.title)}</h1>\n" + "\n".join(parts) + "\n</html>\n"
        runs.write_atomically(self.out / REPORT, page)

    def _table(self, pairs: Sequence[tuple[Job, dict[str, Any]]]) -> Iterable[str]:
        rows = table.collect(pairs)
        yield _section("Test accuracy")
        yield f'<p class="note">{escape(table.CAPTION)}</p>'
        yield _html(table.titles(rows), table.lines(rows))
        yield from (f'<p class="note">{escape(note)}</p>' for note in table.notes(rows))

    def _curves(self, pairs: Sequence[tuple[Job, dict[str, Any]]]) -> Iterable[str]:
        """A pair of pictures for each sparsity, network and data set: lines are means over seeds, bands their range."""
        groups: dict[str, list[Job]] = {}
        for job, _ in pairs:
            if self.metrics[job.out]:
                groups.setdefault(self._group(job), []).append(job)
        labels = list(dict.fromkeys(self._line(job) for some in groups.values() for job in some))
        if not groups:
            return
        yield _section("Over the epochs")
        yield '<p class="note">Lines are means over seeds, bands reach from the lowest seed to the highest.</p>'
        legend = "".join(f"<li>{svg.swatch(i)}{escape(label)}</li>" for i, label in enumerate(labels))
        yield f'<ul class="legend">{legend}</ul>'
        for group, some in groups.items():
            charts = [
                self._chart(some, labels, "Validation accuracy (%)", _accuracy, None),
                self._chart(some, labels, "Effective density (% of maskable weights)", _effective, None),
                self._chart(some, labels, "Active weights that lie on a path (%)", _on_path, 100.0),
            ]
            yield f'<h3>{escape(group)}</h3><div class="charts">{"".join(charts)}</div>'

    def _chart(
        self, some: Sequence[Job], labels: Sequence[str], title: str, value: Callable[[Mapping[str, Any]], float],
        highest: float | None,
    ) -> str:  # fmt: skip
        lines: dict[str, dict[int, list[float]]] = {label: {} for label in labels}
        for job in some:
            for line in self.metrics[job.out]:
                lines[self._line(job)].setdefault(line["epoch"], []).append(value(line))
        series = [
            svg.Curve(label, [(x, statistics.fmean(ys), min(ys), max(ys)) for x, ys in sorted(points.items())])
            for label, points in lines.items()
        ]
        return f"<div>{svg.curves(series, title, 'epoch', highest)}</div>"

    def _group(self, job: Job) -> str:
        varied = [f"{shown(name)} {value}" for name, value in job.varied.items() if name in ("model", "data")]
        return ", ".join([*varied, f"{job.sparsity * 100:.6g} % of the weights zero"])

    def _line(self, job: Job) -> str:
        others = {name: value for name, value in job.varied.items() if name not in ("model", "data")}
        return " ".join([job.method, *(f"{shown(name)}={value}" for name, value in others.items())])

    def _layers(self, pairs: Sequence[tuple[Job, dict[str, Any]]]) -> Iterable[str]:
        """A verdict on every run; those that are not well stand first."""
        rows = [(self._verdict(job, summary), job) for job, summary in pairs if self.metrics[job.out]]
        if not rows:
            return
        well = [word.startswith("well") for word, _ in rows]
        yield _section("Collapsed layers, run by run")
        yield f'<p class="note">{sum(well)} of {len(rows)} runs have weights on a path in every layer.</p>'
        order = sorted(range(len(rows)), key=lambda i: well[i])
        marked = {position for position, i in enumerate(order) if not well[i]}
        yield _html(["run", "verdict"], [[rows[i][1].out.name, rows[i][0]] for i in order], marked)

    def _verdict(self, job: Job, summary: Mapping[str, Any]) -> str:
        lines = self.metrics[job.out]
        last = lines[-1]
        entry = {
            **{name: last.get(name) for name in ("density", "nonzeros", "effective_density", "validation_accuracy")},
            "test_accuracy": summary.get("test_accuracy"),
            "layers": [{"name": name, "on_path": on} for name, (_, on) in last.get("layers", {}).items()],
        }
        return verdict(entry, lines, summary.get("classes"))

    def _settings(self, pairs: Sequence[tuple[Job, dict[str, Any]]]) -> Iterable[str]:
        """The settings in which runs differ, beside those of the table's columns."""
        first = {job.label: (job, summary) for job, summary in reversed(pairs) if "steps" in summary}
        if len(first) < 2:
            return
        first = {label: first[label] for label in dict.fromkeys(job.label for job, _ in pairs) if label in first}
        values = {label: _resolved(job, summary) for label, (job, summary) in first.items()}
        apart = {"method", "density", "seed"} | {name.replace("_", "-") for job, _ in pairs for name in job.varied}
        names = dict.fromkeys(name for some in values.values() for name in some if name not in apart)
        differ = [name for name in names if len({str(some.get(name)) for some in values.values()}) > 1]
        if not differ:
            return
        yield _section("Settings that differ")
        cells = [[label, *(_plain(some.get(name)) for name in differ)] for label, some in values.items()]
        yield _html(["run", *differ], cells)


def _metrics(folder: Path) -> Lines:
    try:
        return runs.read_metrics(folder)
    except UsageError:  # damaged: the run itself is finished
        return []


def _resolved(job: Job, summary: Mapping[str, Any]) -> dict[str, Any]:
    steps = summary.get("steps_in_all", summary["steps"])
    return job.options.resolve(steps // job.options.epochs).as_dict()


def _accuracy(line: Mapping[str, Any]) -> float:
    return 100 * line["validation_accuracy"]


def _effective(line: Mapping[str, Any]) -> float:
    return 100 * line["effective_density"]


def _on_path(line: Mapping[str, Any]) -> float:
    return 100 * line["effective_density"] / line["density"] if line["density"] else 0.0


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _section(title: str) -> str:
    return f"<h2>{escape(title)}</h2>"


def _list(words: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(word)}</li>" for word in words) + "</ul>"


def _html(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Iterable[int] = ()) -> str:
    """A table; the last cell of a row may break into lines where rows are marked."""
    bad = set(marked)
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f'<td class="words">{escape(cell)}</td>' if len(cell) > 60 else f"<td>{escape(cell)}</td>"
                        for cell in row)  # fmt: skip
        lines.append(f'<tr class="bad">{cells}</tr>' if i in bad else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'
