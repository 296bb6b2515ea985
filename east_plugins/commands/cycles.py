"""The command `cycles`: cyclic training, SCULPT-ing, and the prune-train loops."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import flags, sources
from ..options.programs import Program
from . import parsing

if TYPE_CHECKING:
    from ..training.cycles import Stage


def main(argv: Sequence[str]) -> int:
    """Train all stages, then print and write a table and a picture; returns the exit code."""
    parser = parsing.parser(
        "cycles",
        "Train one network in stages, each a run with a fresh optimizer and a whole schedule of --epochs epochs: "
        "cycles of one mask, SCULPT-ing, or pruning and training in turn. The same command again goes on where it was "
        "stopped.",
        "cycles --program sculpt --cycles 3 --method static+connected --density 0.005 --out runs/sculpt",
        "cycles --program lrr --prune 0.2 --density 0.1 --model resnet20 --epochs 20 --out runs/lrr",
        late=sources.late,
    )
    group = parser.add_argument_group("stages")
    flags.add_flags(group, Program)
    group.add_argument("--images", type=int, default=1000, metavar="N", help="images that losses and curvature are of")
    group.add_argument("--quiet", action="store_true", help="no progress, only the table")
    group.add_argument("--out", required=True, type=flags.folder, metavar="DIR", help="folder of the stages' runs")
    sources.add_flags(parser)
    for name in ("--start", "--order-seed", "--keep-weights", "--limit-steps"):  # the program's to say
        flags.option_strings(parser)[name].help = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    out, images, quiet = (given.pop(name) for name in ("out", "images", "quiet"))
    if images < 2:
        raise UsageError(f"--images must be at least 2, got {images}")
    asked = {field.name: given.pop(field.name) for field in dataclasses.fields(Program) if field.name in given}
    program = Program(**asked)
    parsing.check_config(given)
    from ..measure import cycles as measured  # PyTorch is not waited for where a flag is wrong
    from ..ops import figures
    from ..training import cycles

    figures.figure(1, 1)  # a missing extra is said before hours of work
    done = cycles.run(program, out, finished=_tell, quiet=quiet, **given)
    rows = measured.measure([stage.out for stage, _ in done], images)
    first = done[0][0].options
    print(measured.write(out, rows, f"{program.program}: {first.model} on {first.data}"), end="")
    print(f"table: {out / 'table.md'}   picture: {out / 'cycles.png'}")
    return 0


def _tell(stage: Stage, summary: dict[str, Any]) -> None:
    print(
        f"{stage.name}  {summary['nonzeros']:,} of {summary['maskable']:,} weights active  "
        f"test {summary['test_accuracy']:.2%}  {summary['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
