"""The command `export`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import flags
from .parsing import parser

if TYPE_CHECKING:
    from torch import Tensor

    from ..export.of_run import Exported
    from ..export.of_state import Scripted
    from ..training import runs


def main(argv: Sequence[str]) -> int:
    """Write a run's network as a file, once it agrees with PyTorch on images of the run's test data."""
    args = _parser().parse_args(argv)
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} must be a file in a folder that exists")
    if args.check < 1:
        raise UsageError(f"--check must be at least 1, got {args.check}")
    from ..export.verify import verify
    from ..training import runs

    run, file, images, kind = (_of_state if args.network or args.run.is_file() else _of_run)(args)
    difference = verify(file.run, run.model, run.masks, images, f"the {args.format} file")
    try:
        runs.write_atomically(out, file.content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    active = sum(int(mask.sum()) for mask in run.masks.values())
    print(
        f"{out}: {len(file.content):,} bytes, {active:,} active weights{file.facts}; largest difference from "
        f"PyTorch on {len(images)} {kind} {difference:.1e} of the largest output"
    )
    return 0


def _of_run(args: argparse.Namespace) -> tuple[runs.Run, Exported, Tensor, str]:
    from ..export.of_run import exported
    from ..training import runs

    run = runs.load_run(args.run)
    options = dataclasses.replace(run.config, data_dir=args.data_dir) if args.data_dir else run.config
    test = runs.load_data(options).test
    file = exported(run, args.format, test, args.name or args.out.stem)
    return run, file, next(test.batches(args.check))[0], "test images"


def _of_state(args: argparse.Namespace) -> tuple[Scripted, Exported, Tensor, str]:
    from ..export.of_state import exported, load

    found = load(args.run, args.network)
    return found, exported(found, args.format, args.name or args.out.stem), found.inputs(args.check), "random inputs"


def _parser() -> flags.Parser:
    parse = parser(
        "export",
        "A run's sparse network as a deployable file, checked against PyTorch.",
        "export runs/digits --format c --out digits.c",
        "export runs/digits --format onnx --out digits.onnx",
    )
    parse.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a file of --east-state")
    parse.add_argument("--network", metavar="MODULE:FUNCTION", help="makes the network of a file of --east-state")
    parse.add_argument("--format", required=True, choices=("onnx", "c", "safetensors"), help="kind of file")
    parse.add_argument("--out", type=Path, required=True, metavar="FILE", help="file that is written")
    parse.add_argument("--name", metavar="NAME", help="c: the function is called NAME_run (default: name of --out)")
    parse.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: the run's)")
    parse.add_argument("--check", type=int, default=64, metavar="N", help="images to check with (default: 64)")
    return parse
