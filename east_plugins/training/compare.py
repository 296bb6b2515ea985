"""Several methods at several sparsities with several seeds: one table and one plot. Finished runs are not repeated."""

from __future__ import annotations

import csv
import functools
import io
import logging
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ..errors import EastError, Interrupted, UsageError
from ..ops import figures, files
from ..ops import text as tables
from ..options import sources
from ..options.config import Config
from ..options.flags import check_size
from . import pictures, runs
from .progress import SILENCE, duration, plan
from .trainer import Trainer, train

logger = logging.getLogger(__name__)

GRACE = 30.0  #: seconds that a run has for saving where its parent has died

CAPTION = (
    "Test accuracy in %, mean +- standard deviation over seeds; in brackets the share of the active weights that lies "
    "on a path from input to output."
)

NOTES = {
    "dead": "dead: no active weight lies on a path from input to output, so that the network computes a constant; "
    "`+connected` after a method's name starts it on paths.",
    "diverged": "diverged: the loss was not finite; a smaller `--lr`, or `--clip-norm`, may mend it.",
}


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
    dead: int = 0  #: seeds in which no active weight lies on a path
    diverged: int = 0  #: seeds in which the loss was not finite

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def marks(self) -> list[str]:
        """What is wrong with the runs, in words: `dead`, `1 of 3 diverged`."""
        seeds = len(self.accuracies)
        counts = {mark: getattr(self, mark) for mark in NOTES}
        return [mark if count == seeds else f"{count} of {seeds} {mark}" for mark, count in counts.items() if count]


def jobs(
    methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int], out: Path, settings: Mapping[str, Any]
) -> list[Job]:
    """All runs of a comparison, every one checked; raises `UsageError` before any has started. `settings` are flags of
    `train` by name, those of a `config` file among them."""
    for name in ("density", "method", "seed"):
        if name in settings:
            raise UsageError(f"`{name}` cannot be given to compare; it has `methods`, `sparsities` and `seeds`")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise UsageError(f"`sparsities` must be in [0, 1), got {sparsity:g}")
    for name, values in (("methods", methods), ("sparsities", [f"{s:g}" for s in sparsities]), ("seeds", seeds)):
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UsageError(f"`{name}` must differ, got {twice[0]} twice")
    found = []
    for method in methods:
        for sparsity in [0.0] if _is_dense(method) else sparsities:
            for seed in seeds:
                job = {"method": method, "density": round(1 - sparsity, 12), "seed": seed}
                options = sources.from_flags({**settings, **job})
                found.append(Job(method, sparsity, seed, options, out / f"{method}-{sparsity:g}-seed{seed}"))
    return found


def compare(
    methods: Sequence[str],
    sparsities: Sequence[float],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    workers: int = 1,
    finished: Callable[[Job, dict[str, Any], int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Row]:
    """Train every method at every sparsity with every seed; write `table.md`, `table.csv` and `accuracy.png` to `out`.

    The same command again goes on where it was stopped. A run that fails stops no other. Raises `UsageError` for what
    cannot be, before any work, `Interrupted` on Ctrl-C, and in the end `EastError` where a run failed.

    Args:
        methods: names as `train` takes them, such as `rigl+connected`.
        sparsities: shares of weights that are zero, in [0, 1).
        workers: runs at a time.
        finished: called after every run with its job and summary, the number of finished runs, and of all.
        say: called with lines on what is done: what the runs are, before the first one, then at least every 15 seconds.
        settings: flags of `train` by name, such as `epochs=12` or `config="digits.yaml"`.
    """
    out = Path(out)
    check_size("jobs", workers, "`workers`")
    settings.setdefault("threads", _threads(workers))
    todo = jobs(methods, sparsities, seeds, out, settings)
    for folder in (out, *(job.out for job in todo)):
        runs.check_folder(folder)
    figures.figure(1, 1)  # a missing extra is said before hours of work
    say = say or (lambda line: None)
    for line in check(todo):
        say(line)
    say(f"in all    {len(todo)} runs, {min(workers, len(todo))} at a time, in {out}; a line when one is finished")
    runs.make_folder(out)
    summaries: list[tuple[Job, dict[str, Any]]] = []
    failed: list[str] = []
    try:
        with files.locked(out), Watch(todo, say):
            for job, result in run(todo, workers):
                if isinstance(result, Exception):
                    failed.append(f"{job.out.name}: {' '.join(f'{type(result).__name__}: {result}'.split())}")
                    say(f"failed    {failed[-1]}")
                    continue
                summaries.append((job, result))
                write(out, todo, summaries)
                if finished is not None:
                    finished(job, result, len(summaries), len(todo))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped after {len(summaries)} of {len(todo)} runs; the same command goes on") from None
    if failed:
        table = f"the others are in {out / 'table.md'}; " if summaries else ""
        raise EastError(f"{len(failed)} of {len(todo)} runs failed; {table}the same command tries again; {failed[0]}")
    return write(out, todo, summaries)


def _threads(workers: int) -> int:
    """Threads of a run: as OMP_NUM_THREADS says, else the machine's cores shared out."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max(1, (os.cpu_count() or 1) // workers)


def write(out: Path, todo: Sequence[Job], summaries: Sequence[tuple[Job, dict[str, Any]]]) -> list[Row]:
    """Table and picture of the runs that are finished; returns the table's rows."""
    order = {job.out: i for i, job in enumerate(todo)}
    rows = collect(sorted(summaries, key=lambda pair: order[pair[0].out]))
    runs.write_atomically(out / "table.md", markdown(rows))
    runs.write_atomically(out / "table.csv", as_csv(rows))
    options = todo[0].options
    title = f"{options.model} on {options.data}, {options.epochs} epochs"
    pictures.accuracy(rows, out / "accuracy.png", 1 / summaries[0][1]["classes"], title)
    return rows


class Watch(threading.Thread):
    """Says every 15 seconds how far the runs of a comparison are, by what stands in their folders."""

    def __init__(self, todo: Sequence[Job], say: Callable[[str], None]):
        super().__init__(daemon=True)
        self.todo, self.say = todo, say
        self.began, self.over = time.monotonic(), threading.Event()
        self.before = sum(self._done(job) for job in todo)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    @staticmethod
    def _done(job: Job) -> int:
        """Epochs that a run has behind it."""
        try:
            return (job.out / runs.METRICS).read_bytes().count(b"\n")
        except OSError:
            return 0

    def run(self) -> None:
        while not self.over.wait(SILENCE):
            if any(not (job.out / runs.SUMMARY).exists() for job in self.todo):
                self.say(self.state())

    def state(self) -> str:
        """The runs that have begun and are not finished, and about how long all of them take."""
        done = {job.out: self._done(job) for job in self.todo}
        going = [
            f"{job.out.name} epoch {min(done[job.out] + 1, job.options.epochs)}/{job.options.epochs}"
            for job in self.todo
            if (job.out / runs.CONFIG).exists() and not (job.out / runs.SUMMARY).exists()
        ]
        new, left = sum(done.values()) - self.before, sum(job.options.epochs for job in self.todo) - sum(done.values())
        passed = time.monotonic() - self.began
        return ", ".join(going or ["starting"]) + (
            f"; about {duration(passed / new * left)} left in all" if new else ""
        )


def check(todo: Sequence[Job]) -> list[str]:
    """Compare what is in the folders with what is asked for and build every kind of run once, without training it,
    so that what cannot be is refused before hours of work. Returns what the first unfinished run will do, in lines."""
    unfinished = [job for job in todo if runs.finished(job.options, job.out) is None]
    if not unfinished:
        return ["all of them are finished"]
    data = runs.load_data(unfinished[0].options)
    for job in unfinished:
        if (job.out / runs.CHECKPOINT).exists():
            runs.check_same(job.out, job.options.resolve(data.train.steps(job.options.batch_size)))
    lines: list[str] = []
    for job in {(job.method, job.sparsity): job for job in reversed(unfinished)}.values():
        with job.options.origins.told():
            lines = plan(Trainer(job.options, job.out, data))
    return [f"first     {unfinished[0].out.name}", *lines]


def run(todo: Sequence[Job], workers: int = 1) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Train what is not finished yet; yields every job with its summary, those that were finished first, or with what
    it failed of. A run whose process dies is tried once more."""
    summaries = {job.out: runs.finished(job.options, job.out) for job in todo}
    yield from ((job, summary) for job in todo if (summary := summaries[job.out]) is not None)
    todo = [job for job in todo if summaries[job.out] is None]
    if workers == 1 or len(todo) < 2:
        for job in todo:
            yield job, _result(functools.partial(train, job.options, job.out, resume=True, quiet=True))
        return
    waiting, died = deque(todo), list[Job]()
    while waiting:
        for job, result in _side_by_side(waiting, workers):
            if isinstance(result, BrokenProcessPool):
                died.append(job)
            else:
                yield job, result
    for job in died:  # by itself: a process that dies takes those beside it along
        yield from _side_by_side(deque([job]), 1)


def _side_by_side(waiting: deque[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Train `waiting` in processes, until none is left or one of the processes has died."""
    spawn = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        while running or waiting:
            while waiting and len(running) < workers:  # one more, and the pool would start it after Ctrl-C
                job = waiting[0]
                try:
                    running[pool.submit(train, job.options, job.out, True, True)] = job
                except BrokenProcessPool:
                    break
                waiting.popleft()
            if not running:  # the pool is broken
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), _result(future.result)


def _result(of: Callable[[], dict[str, Any]]) -> dict[str, Any] | Exception:
    """What a run gives, or what it fails of; Ctrl-C is no failure."""
    try:
        return of()
    except Interrupted:
        raise
    except Exception as error:  # whatever a run, or a plugin of somebody else's in it, raises
        logger.debug("a run failed", exc_info=error)
        return error


def _end_with_parent() -> None:
    """In a worker: where the process that started it dies, save and end, as on Ctrl-C."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for_end, args=(parent.sentinel,), daemon=True).start()


def _wait_for_end(sentinel: int) -> None:
    connection.wait([sentinel])
    signal.raise_signal(signal.SIGINT)  # taken by the main thread
    time.sleep(GRACE)
    os._exit(130)


def collect(summaries: Sequence[tuple[Job, dict[str, Any]]]) -> list[Row]:
    """One row for each method and sparsity, in the order of the jobs."""
    cells: dict[tuple[str, float], list[dict]] = {}
    for job, summary in summaries:
        cells.setdefault((job.method, job.sparsity), []).append(summary)
    return [
        Row(
            method,
            sparsity,
            [s["test_accuracy"] for s in cell],
            [s["effective_density"] / s["density"] for s in cell],
            sum(not s["effective_density"] for s in cell),
            sum(bool(s.get("diverged")) for s in cell),
        )
        for (method, sparsity), cell in cells.items()
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A caption, and test accuracy, mean and standard deviation over seeds, methods down and sparsities across; in
    brackets the share of the active weights that lies on a path from input to output."""
    sparsities = sorted({row.sparsity for row in rows if not _is_dense(row.method)}) or [0.0]
    cells = {(row.method, row.sparsity): row for row in rows}
    head = ["method", *(f"{sparsity * 100:.6g} %" for sparsity in sparsities)]
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        line = [method]
        for sparsity in sparsities:
            row = cells.get((method, 0.0 if _is_dense(method) else sparsity))
            line.append("" if row is None else _cell(row))
        lines.append(line)
    notes = [f"{note}\n" for mark, note in NOTES.items() if any(getattr(row, mark) for row in rows)]
    return "\n".join([f"{CAPTION}\n", tables.markdown(head, lines), *notes]).rstrip("\n") + "\n"


def _cell(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {100 * row.spread:.1f}"
    return f"{100 * row.mean:.1f}{spread} ({', '.join([f'{statistics.fmean(row.effective):.0%}', *row.marks])})"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a method and sparsity, accuracies as fractions of 1; `std` is empty for one seed."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["method", "sparsity", "mean", "std", "seeds", "on_path", "dead", "diverged", "accuracies"])
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread:.6f}"
        values = [f"{row.mean:.6f}", spread, len(row.accuracies), f"{statistics.fmean(row.effective):.6f}"]
        values += [row.dead, row.diverged]
        writer.writerow([row.method, row.sparsity, *values, " ".join(f"{a:.6f}" for a in row.accuracies)])
    return text.getvalue()


def _is_dense(method: str) -> bool:
    """Whether the method has all weights active, tricks or not, so that it has one row at every sparsity."""
    return method.split("+")[0] == "dense"
