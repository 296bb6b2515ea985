"""A finished run's network as a file of each format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from ..training import classes, runs
from ..training.images import ImageFiles, Images
from .formats import load_sparse, to_c, to_onnx
from .interface import Interface
from .program import image_program
from .safetensors import to_safetensors
from .verify import Run, run_c, run_onnx


@dataclass(frozen=True)
class Exported:
    """The file, what runs it, and facts of it for people."""

    content: bytes
    run: Run
    facts: str = ""


def exported(run: runs.Run, kind: str, test: Images | ImageFiles, name: str = "network") -> Exported:
    """The network of `run` as a file of `kind` ("c", "onnx" or "safetensors"), with what `test` says of its inputs.

    `name` is the one of the C function. Raises as `to_c` and `to_onnx` do.
    """
    if kind not in _KINDS:
        raise UsageError(f"kind of file {kind!r}; allowed are {', '.join(_KINDS)}")
    return _KINDS[kind](run, interface(run, test), name)


def interface(run: runs.Run, test: Images | ImageFiles) -> Interface:
    """Normalisation and class names of a run's data."""
    mean, deviation = (tuple(tensor.flatten().tolist()) for tensor in (test.mean, test.std))
    labels = classes.names(run.config.data, run.config.data_dir, run.summary["classes"])
    return Interface(mean, deviation, tuple(labels))


def _c(run: runs.Run, about: Interface, name: str) -> Exported:
    file = to_c(run.model, run.masks, run.input_shape, name, about)
    memory = f", static memory {file.arena_bytes:,} bytes of activations and {file.table_bytes:,} of tables"
    return Exported((file.text + image_program(file)).encode(), run_c(file), memory)


def _onnx(run: runs.Run, about: Interface, name: str) -> Exported:
    content = to_onnx(run.model, run.masks, run.input_shape, about)
    return Exported(content, run_onnx(content))


def _safetensors(run: runs.Run, about: Interface, name: str) -> Exported:
    shape, outputs = list(run.input_shape), run.summary["classes"]
    network = {"config": run.config.as_dict(), "classes": outputs, "input_shape": shape, **about.metadata()}
    content = to_safetensors(run.model, run.masks, network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        model, _ = load_sparse(path)

    def forward(inputs: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(inputs)).detach().numpy()

    return Exported(content, forward)


_KINDS: dict[str, Callable[[runs.Run, Interface, str], Exported]] = {
    "onnx": _onnx, "c": _c, "safetensors": _safetensors,
}  # fmt: skip
