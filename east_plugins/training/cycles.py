"""Cyclic training and prune-train loops: a chain of runs, each with a fresh optimizer and a whole schedule.

Every stage is an ordinary run in a folder of its own, which begins with weights of one run and the masks of another:
cyclic training and SCULPT-ing (Gadhikar et al. 2024), iterative magnitude pruning with weights rewound to the start
(IMP, Frankle and Carbin 2019), to an epoch of the first stage (WR, Frankle et al. 2020), or not at all (LRR, Renda et
al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..ops import files
from ..options import sources
from ..options.config import Config
from ..options.programs import Program
from . import runs
from .trainer import train

METHOD = "static"  #: where none is named
OTHER_ORDER = 7919  #: what is added to the seed of the images' order from stage to stage
OF_A_STAGE = ("start", "order_seed", "keep_weights", "sparse_init_run", "limit_steps")  #: not to be given


@dataclass(frozen=True)
class Stage:
    """One run of a program."""

    name: str
    options: Config
    out: Path


def stages(program: Program, out: Path, settings: Mapping[str, Any]) -> list[Stage]:
    """All runs of a program, every one checked; `settings` are flags of `train` by name. Raises `UsageError`."""
    for name in OF_A_STAGE:
        if settings.get(name) is not None:
            raise UsageError(f"`{name}` cannot be given here: the program says how each stage begins and ends")
    asked = sources.from_flags(settings, method=METHOD)
    density = asked.decided("density") if asked.method.split("+")[0] != "dense" else 1.0
    densities = program.densities(density)
    rewind = 0 if program.program == "imp" else program.rewind or 1
    if program.program == "wr" and not 1 <= rewind <= asked.epochs:
        raise UsageError(f"`rewind` must be an epoch from 1 to {asked.epochs}, got {rewind}")
    found: list[Stage] = []
    for number, level in enumerate(densities):
        given: dict[str, Any] = {"density": level}
        if number == 0 and program.program in ("imp", "wr"):
            given["keep_weights"] = [rewind]
        if number:
            before = found[-1].out
            start = found[0].out / runs.weights_of(rewind) if program.program in ("imp", "wr") else before
            given |= {"start": str(start), "weight_init": "default", "order_seed": asked.seed + OTHER_ORDER * number}
            given |= {"sparse_init": "pruned", "sparse_init_run": str(before)}
        kept = {name: value for name, value in settings.items() if value is not None}
        name = f"stage{number + 1}"
        options = sources.from_flags({**_without_allocation(kept, number), **given}, method=METHOD)
        found.append(Stage(name, options, out / name))
    return found


def _without_allocation(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Settings less the options of the first stage's allocation, in a later one."""
    return {n: v for n, v in settings.items() if not number or not n.startswith("sparse_init")}


def run(
    program: Program,
    out: str | Path,
    *,
    finished: Callable[[Stage, dict[str, Any]], None] | None = None,
    quiet: bool = True,
    **settings: Any,
) -> list[tuple[Stage, dict[str, Any]]]:
    """Train all stages of a program in folders of `out`; the same call again goes on where it was stopped.

    Returns every stage with its run's summary. `settings` are flags of `train` by name; `finished` is called after
    every stage. Raises as `train`.
    """
    out = Path(out)
    todo = stages(program, out, settings)
    for folder in (out, *(stage.out for stage in todo)):
        runs.check_folder(folder)
    runs.make_folder(out)
    done = []
    with files.locked(out):
        for stage in todo:
            summary = train(stage.options, stage.out, resume=True, quiet=quiet)
            done.append((stage, summary))
            if finished is not None:
                finished(stage, summary)
    return done
