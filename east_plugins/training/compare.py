"""Several methods at several sparsities with several seeds, and whatever else a grid file varies: one table and one
plot. Finished runs are not repeated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import EastError, Interrupted, UsageError
from ..ops import figures, files
from ..options.flags import check_size
from . import pictures, pool, rays, runs, table
from .images import Data
from .jobs import Job, jobs
from .pool import Outcome
from .progress import SILENCE, plan
from .report import Report
from .table import Row
from .trainer import Trainer
from .watch import Watch

BACKENDS = ("local", "ray")

Summaries = Sequence[tuple[Job, dict[str, Any]]]


def compare(
    methods: Sequence[str] | None,
    sparsities: Sequence[float] | None,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    backend: str = "local",
    finished: Callable[[Job, dict[str, Any], int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Row]:
    """Train every method at every sparsity with every seed; write `table.md`, `table.csv`, `accuracy.png` and
    `report.html` to `out`, as runs finish.

    The same command again goes on where it was stopped, or killed. A run that fails stops no other. Raises `UsageError`
    for what cannot be, before any work, `Interrupted` on Ctrl-C, and in the end `EastError` where a run failed.

    Args:
        methods: names as `train` takes them, such as `rigl+connected`. None, as sparsities and seeds: as the `grid` of
            the `config` file says, or as the command `compare` does by itself.
        sparsities: shares of weights that are zero, in [0, 1).
        workers: runs at a time; by default one on this machine, and as many as there is room for on a Ray cluster.
        backend: `local`, processes on this machine, spread over its GPUs, or `ray`.
        finished: called after every run with its job and summary, the number of finished runs, and of all.
        say: called with lines on what is done: what the runs are, before the first one, then at least every 15 seconds.
        settings: flags of `train` by name, such as `epochs=12` or `config="digits.yaml"`.
    """
    out = Path(out)
    settings.setdefault("threads", threads(workers, backend))
    todo = jobs(methods, sparsities, seeds, out, settings)
    page = Report(out, todo, _title(todo))

    def written(summaries: Summaries, failed: Sequence[str]) -> None:
        if summaries:
            write(out, todo, summaries)
        page.write(summaries, failed)

    summaries = train_all(
        todo, out, workers=workers, backend=backend, finished=finished, say=say,
        written=written,
    )  # fmt: skip
    return write(out, todo, summaries)


def threads(workers: int | None, backend: str = "local") -> int:
    """Threads of each of so many runs at a time: as OMP_NUM_THREADS says, else the machine's cores shared out; raises
    `UsageError` where there is no such backend, or it cannot be used."""
    check_size("jobs", workers, "`workers`")
    if backend not in BACKENDS:
        raise UsageError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "ray":
        rays.check()
    said = os.environ.get("OMP_NUM_THREADS", "")
    at_once = workers or (1 if backend == "local" else os.cpu_count() or 1)
    return int(said) if said.isdecimal() and int(said) else max(1, (os.cpu_count() or 1) // at_once)


def train_all(
    todo: Sequence[Job],
    out: Path,
    *,
    workers: int | None = None,
    backend: str = "local",
    finished: Callable[[Job, dict[str, Any], int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    written: Callable[[Summaries, Sequence[str]], object] = lambda summaries, failed: None,
    report: str = "table.md",
    fits: Callable[[Trainer], object] = lambda trainer: None,
) -> list[tuple[Job, dict[str, Any]]]:
    """Train every job that is not finished, in folders of `out`; returns all with their summaries.

    `written` is called after every run with what is finished, and words on what failed, and writes `report`; `fits`
    with every kind of run before the first of them, and raises where it cannot be. The rest is as of `compare`.
    """
    for folder in (out, *(job.out for job in todo)):
        runs.check_folder(folder)
    figures.figure(1, 1)  # a missing extra is said before hours of work
    say = say or (lambda line: None)
    for line in check(todo, say, fits):
        say(line)
    at_once = min(workers or (1 if backend == "local" else len(todo)), len(todo))
    say(f"in all    {len(todo)} runs, {at_once} at a time, in {out}; a line when one is finished")
    runs.make_folder(out)
    summaries: list[tuple[Job, dict[str, Any]]] = []
    failed: list[str] = []
    try:
        with files.locked(out), Watch(todo, say, at_once):
            for job, result in run(todo, workers, backend):
                if isinstance(result, Exception):
                    failed.append(f"{job.out.name}: {' '.join(f'{type(result).__name__}: {result}'.split())}")
                    say(f"failed    {failed[-1]}")
                    written(summaries, failed)
                    continue
                summaries.append((job, result))
                written(summaries, failed)
                if finished is not None:
                    finished(job, result, len(summaries), len(todo))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped after {len(summaries)} of {len(todo)} runs; the same command goes on") from None
    if failed:
        told = f"the others are in {out / report}; " if summaries else ""
        raise EastError(f"{len(failed)} of {len(todo)} runs failed; {told}the same command tries again; {failed[0]}")
    return summaries


def check(
    todo: Sequence[Job],
    say: Callable[[str], None] = lambda line: None,
    fits: Callable[[Trainer], object] = lambda trainer: None,
) -> list[str]:
    """Compare what is in the folders with what is asked for and build every kind of run once, without training it,
    so that what cannot be is refused before hours of work. Returns what the first unfinished run will do, in lines."""
    unfinished = [job for job in todo if runs.finished(job.options, job.out) is None]
    if not unfinished:
        return ["all of them are finished"]
    datasets: dict[tuple[Any, ...], Data] = {}
    for job in unfinished:
        data = _data(job, datasets)
        if (job.out / runs.CHECKPOINT).exists():
            runs.check_same(job.out, job.options.resolve(data.train.steps(job.options.batch_size)))
    kinds, spoke = {(job.label, job.sparsity): job for job in reversed(unfinished)}, time.monotonic()
    lines: list[str] = []
    for i, job in enumerate(kinds.values(), 1):
        with job.options.origins.told():
            trainer = Trainer(job.options, job.out, _data(job, datasets))
        fits(trainer)
        if i == len(kinds):
            lines = plan(trainer)
        elif time.monotonic() - spoke > SILENCE:
            say(f"checking  {i} of {len(kinds)} kinds of runs")
            spoke = time.monotonic()
    return [f"first     {unfinished[0].out.name}", *lines]


def _data(job: Job, datasets: dict[tuple[Any, ...], Data]) -> Data:
    """A job's images, loaded once for all jobs that have the same."""
    options = job.options
    key = (options.data, options.data_dir, options.image_size, options.limit)
    if key not in datasets:
        with options.origins.told():
            datasets[key] = runs.load_data(options)
    return datasets[key]


def run(todo: Sequence[Job], workers: int | None = None, backend: str = "local") -> Iterator[Outcome]:
    """Train what is not finished yet; yields every job with its summary, those that were finished first, or with what
    it failed of."""
    summaries = {job.out: runs.finished(job.options, job.out) for job in todo}
    yield from ((job, summary) for job in todo if (summary := summaries[job.out]) is not None)
    todo = [job for job in todo if summaries[job.out] is None]
    if todo:
        yield from rays.run(todo, workers) if backend == "ray" else pool.run(todo, workers or 1)


def write(out: Path, todo: Sequence[Job], summaries: Summaries) -> list[Row]:
    """Table and picture of the runs that are finished; returns the table's rows."""
    order = {job.out: i for i, job in enumerate(todo)}
    rows = table.collect(sorted(summaries, key=lambda pair: order[pair[0].out]))
    runs.write_atomically(out / "table.md", table.markdown(rows))
    runs.write_atomically(out / "table.csv", table.as_csv(rows))
    if tested := [row for row in rows if row.accuracies]:
        classes = {summary["classes"] for _, summary in summaries}
        pictures.accuracy(tested, out / "accuracy.png", 1 / max(classes) if len(classes) == 1 else None, _title(todo))
    return rows


def _title(todo: Sequence[Job]) -> str:
    """What all runs have in common."""

    def common(values: Sequence[Any], many: str) -> str:
        return f"{values[0]}" if len(set(values)) == 1 else f"{len(set(values))} {many}"

    options = [job.options for job in todo]
    model, data = common([o.model for o in options], "networks"), common([o.data for o in options], "data sets")
    return f"{model} on {data}, {common([o.epochs for o in options], 'numbers of')} epochs"
