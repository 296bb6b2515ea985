"""The table of a comparison: one row a method, and setting that varies, one column a sparsity."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ops import text as tables
from .jobs import Job, is_dense, label, shown

CAPTION = (
    "Test accuracy in %, mean +- standard deviation over seeds; in brackets the share of the active weights that lies "
    "on a path from input to output."
)

NOTES = {
    "dead": "dead: no active weight lies on a path from input to output, so that the network computes a constant; "
    "`+connected` after a method's name starts it on paths.",
    "diverged": "diverged: the loss was not finite; a smaller `--lr`, or `--clip-norm`, may mend it.",
    "unfinished": "unfinished: stopped by `--limit-steps`, nothing was tested; the same command without it goes on.",
}


@dataclass(frozen=True)
class Row:
    """One cell of the table: a method, and what is varied, at a sparsity, over its seeds."""

    method: str
    sparsity: float
    accuracies: list[float]
    effective: list[float]
    dead: int = 0  #: seeds in which no active weight lies on a path
    diverged: int = 0  #: seeds in which the loss was not finite
    unfinished: int = 0  #: seeds that were stopped early, and are no part of the figures
    varied: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label(self.method, self.varied)

    @property
    def mean(self) -> float:
        """NaN where no seed was tested."""
        return statistics.fmean(self.accuracies) if self.accuracies else float("nan")

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def marks(self) -> list[str]:
        """What is wrong with the runs, in words: `dead`, `1 of 3 diverged`."""
        seeds = len(self.accuracies) + self.unfinished
        counts = {mark: getattr(self, mark) for mark in NOTES}
        return [mark if count == seeds else f"{count} of {seeds} {mark}" for mark, count in counts.items() if count]

    @property
    def text(self) -> str:
        """The cell as the table has it."""
        if not self.accuracies:
            return ", ".join(self.marks)
        spread = "" if self.spread is None else f" +- {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread} ({', '.join([f'{statistics.fmean(self.effective):.0%}', *self.marks])})"


def collect(summaries: Sequence[tuple[Job, dict[str, Any]]]) -> list[Row]:
    """One row for each method, setting that varies and sparsity, in the order of the jobs."""
    cells: dict[tuple[str, float], list[tuple[Job, dict]]] = {}
    for job, summary in summaries:
        cells.setdefault((job.label, job.sparsity), []).append((job, summary))
    return [_row(cell[0][0], [summary for _, summary in cell]) for cell in cells.values()]


def _row(job: Job, cell: Sequence[dict[str, Any]]) -> Row:
    tested = [summary for summary in cell if not summary.get("unfinished")]
    return Row(
        job.method,
        job.sparsity,
        [s["test_accuracy"] for s in tested],
        [s["effective_density"] / s["density"] for s in tested],
        sum(not s["effective_density"] for s in tested),
        sum(bool(s.get("diverged")) for s in tested),
        len(cell) - len(tested),
        job.varied,
    )


def head(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    """The settings that vary, and the sparsities: the table's columns behind the methods."""
    sparsities = sorted({row.sparsity for row in rows if not is_dense(row.method)}) or [0.0]
    return list(dict.fromkeys(name for row in rows for name in row.varied)), sparsities


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, without its head."""
    names, sparsities = head(rows)
    cells = {(row.label, row.sparsity): row for row in rows}
    found = []
    for row in {row.label: row for row in rows}.values():
        line = [row.method, *(row.varied.get(name, "") for name in names)]
        for sparsity in sparsities:
            cell = cells.get((row.label, 0.0 if is_dense(row.method) else sparsity))
            line.append("" if cell is None else cell.text)
        found.append(line)
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What the marks in the table mean."""
    return [note for mark, note in NOTES.items() if any(getattr(row, mark) for row in rows)]


def titles(rows: Sequence[Row]) -> list[str]:
    """The table's head."""
    names, sparsities = head(rows)
    return ["method", *map(shown, names), *(f"{sparsity * 100:.6g} %" for sparsity in sparsities)]


def markdown(rows: Sequence[Row]) -> str:
    """A caption, and test accuracy, mean and standard deviation over seeds, methods down and sparsities across; in
    brackets the share of the active weights that lies on a path from input to output."""
    table = tables.markdown(titles(rows), lines(rows))
    return "\n".join([f"{CAPTION}\n", table, *(f"{note}\n" for note in notes(rows))]).rstrip("\n") + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a method, setting that varies and sparsity, accuracies as fractions of 1; `std` is empty for one seed,
    and so are all where nothing was tested."""
    text, (names, _) = io.StringIO(), head(rows)
    writer = csv.writer(text)
    marks = list(NOTES)
    writer.writerow(["method", *names, "sparsity", "mean", "std", "seeds", "on_path", *marks, "accuracies"])
    for row in rows:
        tested = bool(row.accuracies)
        values: list[Any] = [f"{row.mean:.6f}" if tested else "", "" if row.spread is None else f"{row.spread:.6f}"]
        values += [len(row.accuracies), f"{statistics.fmean(row.effective):.6f}" if tested else ""]
        values += [getattr(row, mark) for mark in marks]
        varied = [row.varied.get(name, "") for name in names]
        writer.writerow([row.method, *varied, row.sparsity, *values, " ".join(f"{a:.6f}" for a in row.accuracies)])
    return text.getvalue()
