"""The command `bench inference`: the dense network beside its sparse exports, in one process."""

from __future__ import annotations

import argparse
import io
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..commands import bench
from ..errors import UsageError
from ..export.c import CFile
from ..export.formats import to_c, to_onnx
from ..export.graph import trace
from ..export.onnx_dense import dense_onnx
from ..export.onnx_model import import_onnx
from ..export.safetensors import to_safetensors
from ..export.verify import COMPILE, Run, compile_c, run_c, run_onnx, verify
from ..ops.maskable import theoretical_size
from ..options import flags
from . import networks as subject
from .chart import bar_chart, check_path

logger = logging.getLogger(__name__)

OF_A_DRAWN_NETWORK = ("model", "classes", "density", "masks", "dctps")
CALLS = 10  # inferences of batch 1 in one measurement


def main(argv: Sequence[str]) -> int:
    """Time inference, print a table or JSON, draw a bar chart."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = [f"--{name}" for name in OF_A_DRAWN_NETWORK if getattr(args, name) != parser.get_default(name)]
    if args.run and given:
        raise UsageError(f"{' '.join(given)}: a RUN is measured as it is, leave them out")
    if min(args.repeats, args.threads, *args.batch) < 1:
        raise UsageError("--repeats, --threads and --batch must be at least 1")
    if args.plot:
        check_path(args.plot)
    torch.set_num_threads(args.threads)
    result = inference(*_subject(args), args)
    if args.plot:
        bar_chart(result, f"{args.run or args.model}", args.plot)
    print(json.dumps(result) if args.json else _as_text(result))
    return 0


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="east_plugins bench inference",
        description="Inference on the CPU: dense in PyTorch and onnxruntime, sparse as ONNX and C. The network is a "
        "run's, or one drawn for 32 x 32 images with random norms.",
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a finished run: its network, masks as trained")
    add("--model", default="resnet34", metavar="NAME", help="network (default: resnet34)")
    add("--classes", type=int, default=10, metavar="N", help="its outputs (default: 10)")
    add("--density", type=float, default=0.0005, metavar="X", help="active share of the weights (default: 0.0005)")
    add("--masks", default="connected", choices=tuple(subject.STARTS),
        help="connected; trained: connected, then moved by RigL's updates on random images; random: ERK "
        "(default: connected)")  # fmt: skip
    add("--dctps", action="store_true", help="DCTpS layers")
    add("--seed", type=int, default=0, metavar="N", help="seed of masks and values (default: 0)")
    add("--batch", type=_integers, default=[1, 64], metavar="N,N", help="batch sizes (default: 1,64)")
    add("--repeats", type=int, default=20, metavar="N", help="rounds (default: 20)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of PyTorch and onnxruntime (default: 1)")
    add("--plot", type=Path, metavar="FILE", help="bar chart as PNG, SVG or PDF")
    add("--json", action="store_true", help="one JSON object in place of the table")
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers, as in 1,64") from None


def _subject(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor], tuple[int, ...]]:
    """Network, masks and input shape."""
    if args.run:
        from ..training import runs

        run = runs.load_run(args.run)
        return run.model, run.masks, run.input_shape
    return *subject.draw(args.model, args.classes, args.density, args.masks, args.seed, args.dctps), subject.SHAPE


def inference(
    model: nn.Module, masks: dict[str, Tensor], input_shape: Sequence[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Rows, ratios, sizes in bytes and differences from PyTorch, as `bench --json` prints them.

    A row's name is the candidate's, with `_batchN` for batches other than 1; its milliseconds are those of a batch.
    """
    dense, onnx = dense_onnx(trace(model, {}, input_shape)), to_onnx(model, masks, input_shape)
    candidates: dict[str, Run] = {
        "pytorch_dense": _in_pytorch(model),
        "onnxruntime_dense": run_onnx(dense, args.threads),
        "onnx": run_onnx(onnx, args.threads),
    }
    sizes = {"pytorch_dense": _state_bytes(model), "onnxruntime_dense": len(dense), "onnx": len(onnx)}
    sizes["safetensors"] = len(to_safetensors(model, masks))
    try:
        c = to_c(model, masks, input_shape)
        candidates["c"] = run_c(c)
        sizes |= {"c": len(c.text), "c_object": _object_bytes(c), "c_arena": c.arena_bytes}
    except UsageError as error:
        logger.warning("no C file: %s", error)
    generator = torch.Generator().manual_seed(args.seed)
    check = torch.randn(4, *input_shape, generator=generator)
    exported = [name for name in ("onnx", "c") if name in candidates]
    differences = {name: verify(candidates[name], model, masks, check, name) for name in exported}
    rows, ratios = [], {}
    for batch in args.batch:
        suffix = "" if batch == 1 else f"_batch{batch}"
        inputs = torch.randn(batch, *input_shape, generator=generator).numpy()
        rows += _rows({name + suffix: run for name, run in candidates.items()}, inputs, args.repeats)
        ratios |= {
            f"onnxruntime_dense_over_{name}{suffix}": (f"onnxruntime_dense{suffix}", name + suffix)
            for name in ("onnx", "c", "pytorch_dense")
        }
    result = bench.report(rows, ratios)
    result["versions"]["onnxruntime"] = import_onnx()[1].__version__
    counts = {"nonzeros": sum(int(mask.sum()) for mask in masks.values()), "maskable": theoretical_size(model)}
    return {**result, **counts, "sizes": sizes, "differences": differences}


def _rows(candidates: dict[str, Run], inputs: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a call, in turn."""
    calls = CALLS if len(inputs) == 1 else 1
    repeated = {name: _repeated(run, inputs, calls) for name, run in candidates.items()}
    rows = bench.interleaved(repeated, repeats, torch.device("cpu"))
    return [{key: value if key == "name" else value / calls for key, value in row.items()} for row in rows]


def _in_pytorch(model: nn.Module) -> Run:
    def run(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(inputs)).numpy()

    return run


def _repeated(run: Run, inputs: np.ndarray, calls: int) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(calls):
            run(inputs)

    return repeat


def _state_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _object_bytes(file: CFile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return compile_c(file, Path(folder) / "network.o", ("-c", *COMPILE)).stat().st_size


def _as_text(result: dict[str, Any]) -> str:
    sizes = [f"{name:<28} {size / 1024:>10,.1f} KiB" for name, size in result["sizes"].items()]
    return "\n".join([bench.as_text(result), *sizes])
