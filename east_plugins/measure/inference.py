"""Inference on the CPU: the dense network beside its sparse exports, in one process."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..export.c import CFile
from ..export.formats import to_c, to_onnx
from ..export.graph import trace
from ..export.onnx_dense import dense_onnx
from ..export.onnx_model import import_onnx
from ..export.safetensors import to_safetensors
from ..export.verify import COMPILE, Run, compile_c, run_c, run_onnx, verify
from ..ops.doing import doing
from ..ops.maskable import theoretical_size
from . import timing

logger = logging.getLogger(__name__)

CALLS = 10  # inferences of batch 1 in one measurement


def inference(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    input_shape: Sequence[int],
    batches: Sequence[int] = (1, 64),
    repeats: int = 20,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows, ratios, sizes in bytes and differences from PyTorch, as `bench --json` prints them.

    `threads` are those of onnxruntime. A row's name is the candidate's, with `_batchN` for batches other than 1; its
    milliseconds are those of a batch.
    """
    doing("writing the network as ONNX and C, dense and sparse")
    dense, onnx = dense_onnx(trace(model, {}, input_shape)), to_onnx(model, masks, input_shape)
    candidates: dict[str, Run] = {
        "pytorch_dense": _in_pytorch(model),
        "onnxruntime_dense": run_onnx(dense, threads),
        "onnx": run_onnx(onnx, threads),
    }
    sizes = {"pytorch_dense": _state_bytes(model), "onnxruntime_dense": len(dense), "onnx": len(onnx)}
    sizes["safetensors"] = len(to_safetensors(model, masks))
    try:
        c = to_c(model, masks, input_shape)
        candidates["c"] = run_c(c)
        sizes |= {"c": len(c.text), "c_object": _object_bytes(c), "c_arena": c.arena_bytes}
    except UsageError as error:
        logger.warning("no C file: %s", error)
    generator = torch.Generator().manual_seed(seed)
    check = torch.randn(4, *input_shape, generator=generator)
    exported = [name for name in ("onnx", "c") if name in candidates]
    differences = {name: verify(candidates[name], model, masks, check, name) for name in exported}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, tuple[str, str]] = {}
    for batch in batches:
        suffix = "" if batch == 1 else f"_batch{batch}"
        inputs = torch.randn(batch, *input_shape, generator=generator).numpy()
        rows += _rows({name + suffix: run for name, run in candidates.items()}, inputs, repeats)
        ratios |= {
            f"onnxruntime_dense_over_{name}{suffix}": (f"onnxruntime_dense{suffix}", name + suffix)
            for name in ("onnx", "c", "pytorch_dense")
        }
    result = timing.report(rows, ratios)
    result["versions"]["onnxruntime"] = import_onnx()[1].__version__
    counts = {"nonzeros": sum(int(mask.sum()) for mask in masks.values()), "maskable": theoretical_size(model)}
    return {**result, **counts, "sizes": sizes, "differences": differences}


def _rows(candidates: dict[str, Run], inputs: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a call, in turn."""
    calls = CALLS if len(inputs) == 1 else 1
    repeated = {name: _repeated(run, inputs, calls) for name, run in candidates.items()}
    rows = timing.interleaved(repeated, repeats)
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
