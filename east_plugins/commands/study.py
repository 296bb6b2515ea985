"""The command `study`: which prune criterion is best, and how alike they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import flags, sources
from ..options.programs import STUDY
from . import parsing

if TYPE_CHECKING:
    from ..training.jobs import Job


def main(argv: Sequence[str]) -> int:
    """Train every cell of the study, then print and write its tables and pictures; returns the exit code."""
    parser = parsing.parser(
        "study",
        "Train every prune criterion with every growth, density, update period and seed; write accuracies, average "
        "ranks with their critical distance, ITOP rates and similarities as tables and pictures. The same command "
        "again goes on where it was stopped.",
        "study --model mlp --epochs 20 --densities 0.05,0.2 --periods 100 --seeds 0,1,2 --out runs/study",
        "study --criteria magnitude,SNIP --growths gradient --data cifar10 --data-dir DIR --out runs/snip",
        late=_late,
    )
    group = parser.add_argument_group("study")
    words = dict(
        criteria="prune rules, static and dense as baselines", growths="growth rules", densities="active shares",
        periods="steps between updates", seeds="one run for each",
    )  # fmt: skip
    for name, help in words.items():
        shown = ",".join(map(str, STUDY[name]))
        group.add_argument(f"--{name}", metavar="X,X", help=f"{help} (default: of the grid in --config, else {shown})")
    group.add_argument("--low", type=float, default=0.2, metavar="X", help="largest low density (default: 0.2)")
    group.add_argument(
        "--choices-every", type=int, metavar="N", help="how alike the criteria's choices are at every N-th update too, "
        "for which the first seed's runs are trained again (default: at the first update only)",
    )  # fmt: skip
    parsing.add_backend(group)
    group.add_argument("--out", required=True, type=flags.folder, metavar="DIR", help="folder of runs and report")
    sources.add_flags(parser)
    for name in ("--death", "--growth", "--density", "--update-frequency", "--seed"):  # in the plural here
        flags.option_strings(parser)[name].help = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    out, workers, backend, low = (given.pop(name) for name in ("out", "jobs", "backend", "low"))
    choices = given.pop("choices_every")
    flags.check_size("jobs", workers, "--jobs")
    if choices is not None and choices < 1:
        raise UsageError(f"--choices-every must be at least 1, got {choices}")
    lists = {name: parsing.numbers(f"--{name}", given.pop(name), kind) for name, kind in
             (("criteria", str), ("growths", str), ("densities", float), ("periods", int), ("seeds", int))}  # fmt: skip
    parsing.check_config(given)
    from ..measure import study_report  # PyTorch is not waited for where a flag is wrong
    from ..training import study

    done = study.run(
        **lists, out=out, workers=workers, backend=backend, say=_say, finished=_tell,
        write=lambda done: study_report.write_runs(out, done), **given,
    )  # fmt: skip
    options = done[0][0].job.options
    title = f"{options.model} on {options.data}, {options.epochs} epochs"
    print(study_report.write(out, done, low, title, _say, choices), end="")
    print(f"report: {out / 'study.md'}   runs: {out / 'study.csv'}")
    return 0


def _late(parser: argparse.ArgumentParser, known: argparse.Namespace, unknown: Sequence[str]) -> None:
    """The options of the criteria, and those of the other plugins that are named."""
    sources.late(parser, known, unknown)
    if any(flag.replace("_", "-").startswith("--death-") for flag in unknown):
        from ..training.study import options_of

        there, group = flags.option_strings(parser), parser.add_argument_group("options of the criteria")
        criteria = known.criteria.split(",") if known.criteria else STUDY["criteria"]
        for name, field in options_of(criteria).items():
            if f"--{name.replace('_', '-')}" not in there:
                flags.add_flag(group, name, field)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell(job: Job, summary: dict[str, Any], number: int, count: int) -> None:
    _say(f"{number:>4}/{count}  {job.out.name}  test {summary['test_accuracy']:.2%}  {summary['seconds']:.0f} s")
