"""The command `export`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UsageError
from ..export.formats import load_sparse, to_c, to_onnx
from ..export.program import image_program
from ..export.safetensors import to_safetensors
from ..export.verify import Run, run_c, run_onnx, verify
from ..options import flags
from .parsing import parser


def main(argv: Sequence[str]) -> int:
    """Write a run's network as a file, once it agrees with PyTorch on images of the run's test data."""
    from ..training import runs

    args = _parser().parse_args(argv)
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} must be a file in a folder that exists")
    if args.check < 1:
        raise UsageError(f"--check must be at least 1, got {args.check}")
    run = runs.load_run(args.run)
    options = dataclasses.replace(run.config, data_dir=args.data_dir) if args.data_dir else run.config
    test = runs.load_data(options).test
    content, runner, facts = _FORMATS[args.format](run, args.name or out.stem, test)
    images, _ = next(test.batches(args.check))
    difference = verify(runner, run.model, run.masks, images, f"the {args.format} file")
    try:
        runs.write_atomically(out, content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    active = sum(int(mask.sum()) for mask in run.masks.values())
    print(
        f"{out}: {len(content):,} bytes, {active:,} active weights{facts}; largest difference from PyTorch on "
        f"{len(images)} test images {difference:.1e} of the largest output"
    )
    return 0


def _parser() -> flags.Parser:
    parse = parser(
        "export",
        "A run's sparse network as a deployable file, checked against PyTorch.",
        "export runs/digits --format c --out digits.c",
        "export runs/digits --format onnx --out digits.onnx",
    )
    parse.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parse.add_argument("--format", required=True, choices=tuple(_FORMATS), help="kind of file")
    parse.add_argument("--out", type=Path, required=True, metavar="FILE", help="file that is written")
    parse.add_argument("--name", metavar="NAME", help="c: the function is called NAME_run (default: name of --out)")
    parse.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: the run's)")
    parse.add_argument("--check", type=int, default=64, metavar="N", help="images to check with (default: 64)")
    return parse


def _c(run, name: str, test) -> tuple[bytes, Run, str]:
    file = to_c(run.model, run.masks, run.input_shape, name)
    text = file.text + image_program(file, test.mean, test.std)
    memory = f", static memory {file.arena_bytes:,} bytes of activations and {file.table_bytes:,} of tables"
    return text.encode(), run_c(file), memory


def _onnx(run, name: str, test) -> tuple[bytes, Run, str]:
    content = to_onnx(run.model, run.masks, run.input_shape)
    return content, run_onnx(content), ""


def _safetensors(run, name: str, test) -> tuple[bytes, Run, str]:
    shape, classes = list(run.input_shape), run.summary["classes"]
    network = {"config": run.config.as_dict(), "classes": classes, "input_shape": shape}
    content = to_safetensors(run.model, run.masks, network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        model, _ = load_sparse(path)
    return content, lambda inputs: model(torch.from_numpy(inputs)).detach().numpy(), ""


_FORMATS = {"onnx": _onnx, "c": _c, "safetensors": _safetensors}
