"""The command `experiment`: the paper's headline on one GPU, part by part."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UnknownNameError, UsageError
from ..options import flags
from .parsing import parser


def main(argv: Sequence[str]) -> int:
    """Train a part's runs for at most 9 minutes, or print the table of what is finished."""
    from ..measure import experiment

    parse = parser(
        "experiment",
        "Extreme sparsities on one GPU, the methods beside each other. A part trains its runs, several side by side, "
        "for at most 9 minutes; the same command goes on where it stopped.",
        "experiment resnet34-connected --data cifar10.tar.xz --out runs/gpu",
        "experiment table --out runs/gpu",
    )
    add = parse.add_argument
    add("part", help=f"{', '.join(experiment.PARTS)}, or table", metavar="PART")
    add("--tiny", action="store_true", help="two small runs of the part; also without CUDA")
    add("--data", type=Path, metavar="PATH", help="class folders of 32x32 images, or a tar of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of runs, data and table")
    add("--epochs", type=int, metavar="N", help="length of every run (default: 12)")
    add("--seeds", default="0", metavar="N,N", help="one run for each seed (default: 0)")
    add(
        "--jobs",
        type=int,
        default=4,
        metavar="N",
        help="runs side by side on the GPU (default: 4)",
    )
    add("--seconds", type=float, default=experiment.LIMIT, metavar="N", help=f"then stop (default: {experiment.LIMIT})")
    given, began = vars(parse.parse_args(argv)), time.monotonic()
    given["out"], data = given["out"].resolve(), given.pop("data")
    wanted = experiment.Wanted(**given)
    if wanted.part == "table":
        print(experiment.table(wanted.out))
        return 0
    _prepare(wanted, data)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs are stopped, and save, on the way out
    try:
        finished = experiment.run(wanted, began, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        signal.signal(signal.SIGTERM, before)
    done, todo = experiment.progress(wanted)
    print(f"{wanted.part}: {done} of {todo} runs finished" + ("" if finished else "; the same command goes on"))
    return 0


def _prepare(wanted, data: Path | None) -> None:
    """Refuse what cannot be, then decode the images where that is not done yet."""
    import torch

    from ..measure import experiment

    if wanted.part not in experiment.PARTS:
        raise UnknownNameError("part", wanted.part, [*experiment.PARTS, "table"])
    flags.check_size("jobs", wanted.jobs, "--jobs")
    if wanted.epochs is not None and wanted.epochs < 1:
        raise UsageError(f"--epochs must be at least 1, got {wanted.epochs}")
    if not wanted.tiny and not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device; allowed without one is --tiny")
    experiment.jobs(wanted)
    if not experiment.prepared(wanted.data):
        if data is None or not data.exists():
            raise UsageError("--data must name a folder or archive with train/<class>/ and test/<class>/")
        experiment.prepare(data, wanted.data)
