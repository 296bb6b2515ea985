"""The command `export`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from ..ops.doing import doing
from ..ops.files import write_atomically
from ..options import flags
from .parsing import add_trust, parser

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..export.of_run import Exported


def main(argv: Sequence[str]) -> int:
    """Write a run's network as a file, once it agrees with PyTorch on images of the run's test data."""
    args = _parser().parse_args(argv)
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} must be a file in a folder that exists")
    if args.check < 1:
        raise UsageError(f"--check must be at least 1, got {args.check}")
    found = _of_script(args) if args.network or args.run.is_file() else _of_run(args)
    from ..export.verify import verify

    doing(f"checking the {args.format} file on {len(found.images)} {found.images_are}")
    difference = verify(found.file.run, found.model, found.masks, found.images, f"the {args.format} file")
    try:
        write_atomically(out, found.file.content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    active = sum(int(mask.sum()) for mask in found.masks.values())
    print(
        f"{out}: {len(found.file.content):,} bytes, {active:,} active weights{found.file.facts}; largest "
        f"difference from PyTorch on {len(found.images)} {found.images_are} {difference:.1e} of the largest output"
    )
    return 0


class _Found(NamedTuple):
    """What is exported, and what it is checked with."""

    file: Exported
    model: nn.Module
    masks: Mapping[str, Tensor]
    images: Tensor
    images_are: str


def _of_run(args: argparse.Namespace) -> _Found:
    from ..export.of_run import exported
    from ..training import runs

    run = runs.load_run(args.run)
    options = dataclasses.replace(run.config, data_dir=args.data_dir) if args.data_dir else run.config
    test = runs.load_data(options).test
    doing(f"following the network of {args.run}")
    file = exported(run, args.format, test, args.name or args.out.stem)
    images, _ = next(test.batches(args.check))
    return _Found(file, run.model, run.masks, images, "test images")


def _of_script(args: argparse.Namespace) -> _Found:
    from ..export import of_script

    found = of_script.read(args.run, args.network)
    file = of_script.exported(found, args.format, args.name or args.out.stem)
    return _Found(file, found.model, found.masks, found.inputs(args.check), "random inputs")


def _parser() -> flags.Parser:
    parse = parser(
        "export",
        "A run's sparse network as a deployable file, checked against PyTorch.",
        "export runs/digits --format c --out digits.c",
        "export runs/digits --format onnx --out digits.onnx",
    )
    parse.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a file of --east-state")
    parse.add_argument(
        "--network", metavar="MODULE:FUNCTION", help="for a file of --east-state: what makes its network"
    )
    parse.add_argument("--format", required=True, choices=("onnx", "c", "safetensors"), help="kind of file")
    parse.add_argument("--out", type=Path, required=True, metavar="FILE", help="file that is written")
    parse.add_argument("--name", metavar="NAME", help="c: the function is called NAME_run (default: name of --out)")
    parse.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: the run's)")
    parse.add_argument("--check", type=int, default=64, metavar="N", help="images to check with (default: 64)")
    add_trust(parse)
    return parse
