"""Several methods at several sparsities with several seeds: one table and one plot. Finished runs are not repeated."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, UsageError
from ..ops.files import replacing
from ..options import config, flags
from ..options.config import Config
from . import runs
from .trainer import Interrupted, Trainer, check_same, finished, train


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    method: str
    sparsity: float
    seed: int
    options: Config
    out: Path


@dataclass(frozen=True)
class Row:
    """One cell of the table: a method at a sparsity, over its seeds."""

    method: str
    sparsity: float
    accuracies: list[float]
    effective: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def add_flags(parser: flags.Parser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument("--methods", default="set,rigl,east", metavar="M,M", help="methods, as train takes them")
    group.add_argument("--sparsities", default="0.999,0.9995", metavar="S,S", help="shares of weights that are zero")
    group.add_argument("--seeds", default="0", metavar="N,N", help="one run for each seed")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    group.add_argument("--out", required=True, type=flags.folder, metavar="DIR", help="folder of runs, table and plot")
    config.add_flags(parser)


def jobs(given: dict[str, Any]) -> list[Job]:
    """All runs of a comparison, every one checked; raises `UsageError` before any has started."""
    for name in ("density", "method", "seed"):
        if name in given:
            raise UsageError(f"--{name} cannot be given to compare; it has --methods, --sparsities and --seeds")
    comparison = {name: given.pop(name) for name in ("methods", "sparsities", "seeds", "jobs", "out")}
    if comparison["jobs"] < 1:
        raise UsageError(f"--jobs must be at least 1, got {comparison['jobs']}")
    threads = given.setdefault("threads", max(1, (os.cpu_count() or 1) // comparison["jobs"]))
    if threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    methods = comparison["methods"].split(",")
    sparsities = _numbers("--sparsities", comparison["sparsities"], float)
    seeds = _numbers("--seeds", comparison["seeds"], int)
    wrong = [s for s in sparsities if not 0 <= s < 1]
    if wrong:
        raise UsageError(f"--sparsities must be in [0, 1), got {wrong[0]:g}")
    for name, values in (("methods", methods), ("sparsities", [f"{s:g}" for s in sparsities]), ("seeds", seeds)):
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UsageError(f"--{name} must differ, got {twice[0]} twice")
    found = []
    for method in methods:
        for sparsity in [0.0] if _is_dense(method) else sparsities:
            for seed in seeds:
                job = {"method": method, "density": round(1 - sparsity, 12), "seed": seed}
                options = config.from_flags({**given, **job})
                out = comparison["out"] / f"{method}-{sparsity:g}-seed{seed}"
                found.append(Job(method, sparsity, seed, options, out))
    return found


def check(todo: Sequence[Job]) -> None:
    """Compare what is in the folders with what is asked for and build every kind of run once, without training it,
    so that what cannot be is refused before hours of work."""
    unfinished = [job for job in todo if finished(job.options, job.out) is None]
    data = runs.load_data(unfinished[0].options) if unfinished else None
    for job in unfinished:
        if (job.out / runs.CHECKPOINT).exists():
            check_same(job.out, job.options.resolve(data.train.steps(job.options.batch_size)))
    for job in {(job.method, job.sparsity): job for job in unfinished}.values():
        Trainer(job.options, job.out, data)


def run(todo: Sequence[Job], workers: int = 1) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Train what is not finished yet; yields every job with its summary, those that were finished first."""
    summaries = [(job, finished(job.options, job.out)) for job in todo]
    yield from (pair for pair in summaries if pair[1] is not None)
    todo = [job for job, summary in summaries if summary is None]
    if workers == 1 or len(todo) < 2:
        for job in todo:
            yield job, train(job.options, job.out, resume=True, quiet=True)
        return
    spawn = multiprocessing.get_context("spawn")
    waiting, running = deque(todo), {}
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        while waiting or running:
            while waiting and len(running) < workers:  # one more, and the pool would start it after Ctrl-C
                job = waiting.popleft()
                running[pool.submit(train, job.options, job.out, True, True)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def main(argv: Sequence[str]) -> int:
    """The command `compare`."""
    parser = flags.Parser(prog="east_plugins compare", description=__doc__)
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    workers, out = given["jobs"], given["out"]
    todo = jobs(given)
    for folder in (out, *(job.out for job in todo)):
        runs.check_folder(folder)
    _pyplot()  # a missing extra is said before hours of work
    check(todo)
    runs.make_folder(out)
    summaries = []
    try:
        for job, summary in run(todo, workers):
            summaries.append((job, summary))
            print(
                f"{len(summaries):>3}/{len(todo)}  {job.method:<16} sparsity {job.sparsity:g}  seed {job.seed}  "
                f"test {summary['test_accuracy']:.2%}  {summary['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped after {len(summaries)} of {len(todo)} runs; the same command goes on") from None
    order = {job.out: i for i, job in enumerate(todo)}
    rows = collect(sorted(summaries, key=lambda pair: order[pair[0].out]))
    table = markdown(rows)
    runs.write_atomically(out / "table.md", table)
    runs.write_atomically(out / "table.csv", as_csv(rows))
    print(table)
    plot(rows, out / "accuracy.png", chance=1 / summaries[0][1]["classes"])
    print(f"table: {out / 'table.md'}   plot: {out / 'accuracy.png'}")
    return 0


def collect(summaries: Sequence[tuple[Job, dict[str, Any]]]) -> list[Row]:
    """One row for each method and sparsity, in the order of the jobs."""
    cells: dict[tuple[str, float], list[dict]] = {}
    for job, summary in summaries:
        cells.setdefault((job.method, job.sparsity), []).append(summary)
    return [
        Row(method, sparsity, [s["test_accuracy"] for s in cell], [s["effective_density"] / s["density"] for s in cell])
        for (method, sparsity), cell in cells.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Test accuracy, mean and standard deviation over seeds, methods down and sparsities across; in brackets the
    share of the active weights that lies on a path from input to output."""
    sparsities = sorted({row.sparsity for row in rows if not _is_dense(row.method)}) or [0.0]
    cells = {(row.method, row.sparsity): row for row in rows}
    head = ["method", *(f"{sparsity * 100:.6g} %" for sparsity in sparsities)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(row.method for row in rows):
        line = [method]
        for sparsity in sparsities:
            row = cells.get((method, 0.0 if _is_dense(method) else sparsity))
            line.append("" if row is None else _cell(row))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {100 * row.spread:.1f}"
    return f"{100 * row.mean:.1f}{spread} ({statistics.fmean(row.effective):.0%})"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a method and sparsity, accuracies as fractions of 1; `std` is empty for one seed."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["method", "sparsity", "mean", "std", "seeds", "on_path", "accuracies"])
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread:.6f}"
        values = [f"{row.mean:.6f}", spread, len(row.accuracies), f"{statistics.fmean(row.effective):.6f}"]
        writer.writerow([row.method, row.sparsity, *values, " ".join(f"{a:.6f}" for a in row.accuracies)])
    return text.getvalue()


def plot(rows: Sequence[Row], path: Path, chance: float) -> None:
    """Grouped bars of test accuracy with every seed as a dot, one group a sparsity, and the line of chance."""
    plt = _pyplot()
    methods = list(dict.fromkeys(row.method for row in rows))
    sparsities = sorted({row.sparsity for row in rows})
    figure, axes = plt.subplots(figsize=(2 + 0.42 * len(methods) * len(sparsities), 4.2), layout="constrained")
    width = 0.85 / len(methods)
    for i, method in enumerate(methods):
        mine = [row for row in rows if row.method == method]
        x = [sparsities.index(row.sparsity) + (i - (len(methods) - 1) / 2) * width for row in mine]
        axes.bar(x, [100 * row.mean for row in mine], 0.92 * width, label=method, color=f"C{i}", alpha=0.8)
        for place, row in zip(x, mine, strict=True):
            dots = [100 * accuracy for accuracy in row.accuracies]
            axes.plot([place] * len(dots), dots, "k.", markersize=4)
    axes.axhline(100 * chance, color="grey", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(sparsities)), [f"{s * 100:.6g} %" for s in sparsities])
    axes.set(xlabel="sparsity", ylabel="test accuracy (%)", ylim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    plt.close(figure)


def _pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("accuracy.png needs matplotlib: pip install 'east_plugins[train]'") from error
    return pyplot


def _is_dense(method: str) -> bool:
    """Whether the method has all weights active, tricks or not, so that it has one row at every sparsity."""
    return method.split("+")[0] == "dense"


def _numbers(flag: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} must be numbers joined by commas, got {text!r}") from None
