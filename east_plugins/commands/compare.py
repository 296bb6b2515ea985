"""The command `compare`: several methods at several sparsities with several seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..options import flags, sources
from . import parsing

if TYPE_CHECKING:
    from ..training.jobs import Job


def main(argv: Sequence[str]) -> int:
    """Train all, print and write a table and a plot; returns the exit code."""
    parser = parsing.parser(
        "compare",
        "Train several methods at several sparsities with several seeds: one table, one plot. The same command again "
        "goes on where it was stopped.",
        "compare --config configs/digits.yaml --methods rigl,east --sparsities 0.999 --seeds 0,1 --out runs/digits",
        "compare --methods set,rigl,rigl+connected --data cifar10 --data-dir DIR --jobs 2 --out runs/cifar",
        late=sources.late,
    )
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        metavar="M,M",
        help="methods, as train takes them (default: of the grid in --config, else set,rigl,east)",
    )
    group.add_argument(
        "--sparsities", metavar="S,S", help="shares of weights that are zero (default: of the grid, else 0.999,0.9995)"
    )
    group.add_argument("--seeds", metavar="N,N", help="one run for each seed (default: of the grid, else 0)")
    parsing.add_backend(group)
    group.add_argument("--out", required=True, type=flags.folder, metavar="DIR", help="folder of runs, table and plot")
    sources.add_flags(parser)
    for name in ("--method", "--density", "--seed"):  # in the plural here
        flags.option_strings(parser)[name].help = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    methods, sparsities, seeds, workers, out, backend = (
        given.pop(name) for name in ("methods", "sparsities", "seeds", "jobs", "out", "backend")
    )
    flags.check_size("jobs", workers, "--jobs")
    densities, numbers = parsing.numbers("--sparsities", sparsities, float), parsing.numbers("--seeds", seeds, int)
    parsing.check_config(given)
    from ..training.compare import compare  # PyTorch is not waited for where a flag is wrong
    from ..training.table import markdown

    names = None if methods is None else methods.split(",")
    rows = compare(
        names, densities, out, seeds=numbers, workers=workers, backend=backend, finished=_tell, say=_say, **given
    )
    print(markdown(rows))
    plot = f"   plot: {out / 'accuracy.png'}" if (out / "accuracy.png").exists() else ""  # none where none is tested
    print(f"table: {out / 'table.md'}{plot}   all of it: {out / 'report.html'}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell(job: Job, summary: dict[str, Any], number: int, count: int) -> None:
    if summary.get("unfinished"):
        result = f"unfinished, {summary['steps']:,} of {summary['steps_in_all']:,} steps"
    else:
        result = f"test {summary['test_accuracy']:.2%}"
    print(
        f"{number:>3}/{count}  {job.label:<16} sparsity {job.sparsity:g}  seed {job.seed}  {result}  "
        f"{summary['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
