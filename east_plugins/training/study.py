"""Where to prune: criteria x growth x density x update period x seeds, as jobs of a comparison (Nowak et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import sources
from ..options.programs import STUDY
from ..plugins import registry
from . import compare
from .jobs import Job
from .trainer import Trainer

#: Methods without topology updates that may stand among the criteria.
BASELINES = ("static", "dense")


@dataclass(frozen=True)
class Cell:
    """One run of a study. A baseline has no growth and no period; dense has density 1."""

    criterion: str
    growth: str
    density: float
    period: int
    job: Job

    @property
    def seed(self) -> int:
        return self.job.seed

    @property
    def baseline(self) -> bool:
        return self.criterion in BASELINES


def cells(
    criteria: Sequence[str],
    growths: Sequence[str],
    densities: Sequence[float],
    periods: Sequence[int],
    seeds: Sequence[int],
    out: Path,
    settings: Mapping[str, Any],
) -> list[Cell]:
    """All runs of a study, every one checked; `settings` are flags of `train` by name. `criteria` are prune rules, with
    `static` and `dense` beside them as baselines. Raises `UsageError` before any has started."""
    for name in ("density", "death", "growth", "update_frequency", "seed", "limit_steps"):
        if name in settings:
            raise UsageError(
                f"`{name}` cannot be given to study; it has `criteria`, `growths`, `densities`, `periods` and `seeds`"
            )
    lists = dict(criteria=criteria, growths=growths, densities=densities, periods=periods, seeds=seeds)
    for name, values in lists.items():
        if not values:
            raise UsageError(f"`{name}` must name at least one")
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UsageError(f"`{name}` must differ, got {twice[0]} twice")
    known = options_of(criteria)
    if wrong := [name for name in settings if name.startswith("death_") and name not in {*known, "death_rate"}]:
        raise UsageError(f"`{wrong[0]}` is no option of any of the criteria {', '.join(criteria)}")
    found = []
    for criterion in criteria:
        baseline = criterion in BASELINES
        for density in [1.0] if criterion == "dense" else densities:
            for growth, period in [("", 0)] if baseline else [(g, p) for g in growths for p in periods]:
                for seed in seeds:
                    found.append(_cell(criterion, growth, density, period, seed, out, settings))
    return found


def options_of(criteria: Sequence[str]) -> dict[str, dataclasses.Field[Any]]:
    """The options of the criteria as settings, such as `death_lam`; raises `UnknownNameError`."""
    rules = [registry.pruning.entry(criterion) for criterion in criteria if criterion not in BASELINES]
    return {f"death_{field.name}": field for rule in rules for field in rule.options}


def _cell(
    criterion: str, growth: str, density: float, period: int, seed: int, out: Path, settings: Mapping[str, Any]
) -> Cell:
    own = {"death_rate", *options_of([criterion])}
    given = {name: value for name, value in settings.items() if not name.startswith("death_") or name in own}
    given |= {"density": density, "seed": seed}
    file = settings.get("config")
    values = file.values if isinstance(file, sources.File) else {}
    method = str(settings.get("method") or values.get("method") or "rigl")
    if criterion in BASELINES:
        start = method.partition("+")[2]  # a connected start is every run's
        given["method"] = criterion if criterion == "dense" or not start else f"{criterion}+{start}"
        name = f"{criterion}-{density:g}-seed{seed}"
    else:
        given = {**given, "method": method, "death": criterion, "growth": growth, "update_frequency": period}
        name = f"{criterion}-{growth}-{density:g}-every{period}-seed{seed}"
    varied = {} if criterion in BASELINES else {"death": criterion, "growth": growth, "every": str(period)}
    options, place = sources.from_flags(given), out / name.replace(":", "_")
    job = Job(str(given["method"]), round(1 - density, 12), seed, options, place, varied)
    return Cell(criterion, growth, density, period, job)


#: A study's lists, and what they are called in the grid of a file, where `density` is read as a sparsity.
_GRID = dict(criteria="death", growths="growth", densities="sparsity", periods="update_frequency", seeds="seed")


def lists(asked: Mapping[str, Sequence[Any] | None], settings: dict[str, Any]) -> dict[str, Sequence[Any]]:
    """The lists of a study: as asked for, else of the `grid` of the `config` file in `settings`, which is taken out of
    it, else the defaults. Raises `UsageError` for a grid of anything else."""
    block: Mapping[str, Sequence[Any]] = {}
    if (config := settings.get("config")) is not None:
        file = sources.read(config)
        settings["config"] = dataclasses.replace(file, blocks=())
        if len(file.blocks) > 1:
            raise UsageError(f"`config` {config}: the grid of a study has one block, this one has {len(file.blocks)}")
        block = dict(file.blocks[0]) if file.blocks else {}
        if wrong := [name for name in block if name not in _GRID.values()]:
            known = "death, growth, density, update-frequency and seed"
            raise UsageError(f"`config` {config}: the grid of a study has {known}, not {wrong[0].replace('_', '-')}")
    found: dict[str, Sequence[Any]] = {}
    for name, setting in _GRID.items():
        given = asked[name]
        if given is None and setting in block:
            values = block[setting]
            given = [round(1 - float(value), 12) for value in values] if name == "densities" else values
        found[name] = STUDY[name] if given is None else given
    return found


def run(
    criteria: Sequence[str] | None,
    growths: Sequence[str] | None,
    densities: Sequence[float] | None,
    periods: Sequence[int] | None,
    seeds: Sequence[int] | None,
    out: str | Path,
    *,
    workers: int | None = None,
    backend: str = "local",
    say: Callable[[str], None] = lambda line: None,
    finished: Callable[[Job, dict[str, Any], int, int], None] | None = None,
    write: Callable[[Sequence[tuple[Cell, dict[str, Any]]]], object] | None = None,
    **settings: Any,
) -> list[tuple[Cell, dict[str, Any]]]:
    """Train every cell in a folder of `out`; returns each with its summary. The same call again goes on where it was
    stopped. Lists that are None are as `lists` says, `write` is called with what is finished after every run, and the
    others are as of `cells` and `compare`; raises as the latter."""
    out = Path(out)
    settings.setdefault("threads", compare.threads(workers, backend))
    asked = dict(criteria=criteria, growths=growths, densities=densities, periods=periods, seeds=seeds)
    grid = lists(asked, settings)
    todo = cells(**grid, out=out, settings=settings)
    jobs = [cell.job for cell in todo]

    def written(summaries: compare.Summaries, failed: Sequence[str] = ()) -> None:
        if write is not None:
            found = {job.out: summary for job, summary in summaries}
            write([(cell, found[cell.job.out]) for cell in todo if cell.job.out in found])

    summaries = compare.train_all(
        jobs, out, workers=workers, backend=backend, say=say, finished=finished, written=written, report="study.csv",
        fits=_has_an_update,
    )  # fmt: skip
    found = {job.out: summary for job, summary in summaries}
    return [(cell, found[cell.job.out]) for cell in todo]


def _has_an_update(trainer: Trainer) -> None:
    """Raises `UsageError` where a criterion would never prune."""
    options, schedule = trainer.options, trainer.host.schedule
    if not options.static and not any(schedule.due(step) for step in range(1, options.steps + 1)):
        raise UsageError(
            f"`periods` {options.update_frequency}: a run of {options.steps} steps has no topology update; "
            f"allowed is less than {options.steps}"
        )
