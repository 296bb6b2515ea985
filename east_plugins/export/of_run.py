"""A finished run's network as a file of each format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    about = interface(run, test)
    if kind == "c":
        return c_file(run.model, run.masks, run.input_shape, name, about)
    if kind == "onnx":
        return onnx_file(run.model, run.masks, run.input_shape, about)
    if kind != "safetensors":
        raise UsageError(f"kind of file {kind!r}; allowed are c, onnx, safetensors")
    shape, outputs = list(run.input_shape), run.summary["classes"]
    network = {"config": run.config.as_dict(), "classes": outputs, "input_shape": shape, **about.metadata()}
    network["steps_per_epoch"] = run.summary["steps"] // run.summary["epochs"]
    return sparse_file(run.model, run.masks, network)


def interface(run: runs.Run, test: Images | ImageFiles) -> Interface:
    """Normalisation and class names of a run's data."""
    mean, deviation = (tuple(tensor.flatten().tolist()) for tensor in (test.mean, test.std))
    labels = classes.names(run.config.data, run.config.data_dir, run.summary["classes"])
    return Interface(mean, deviation, tuple(labels))


def c_file(
    model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int], name: str, about: Interface | None = None
) -> Exported:
    """A C file; with `about` there is a program in it that classifies an image."""
    file = to_c(model, masks, input_shape, name, about)
    memory = f", static memory {file.arena_bytes:,} bytes of activations and {file.table_bytes:,} of tables"
    program = image_program(file) if about else ""
    return Exported((file.text + program).encode(), run_c(file), memory)


def onnx_file(
    model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int], about: Interface | None = None
) -> Exported:
    """An ONNX file."""
    content = to_onnx(model, masks, input_shape, about)
    return Exported(content, run_onnx(content))


def sparse_file(
    model: nn.Module, masks: Mapping[str, Tensor], network: Mapping[str, Any], untrained: nn.Module | None = None
) -> Exported:
    """A safetensors file, read back; `network` says what is needed to build the network, else `untrained` is one."""
    content = to_safetensors(model, masks, network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        read, _ = load_sparse(path, untrained)

    def forward(inputs: np.ndarray) -> np.ndarray:
        return read(torch.from_numpy(inputs)).detach().numpy()

    return Exported(content, forward)
