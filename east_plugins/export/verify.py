"""Exported files against the PyTorch network that they come from."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EastError, UsageError
from .c import CFile
from .graph import masked_copy
from .onnx_model import session

TOLERANCE = 1e-5
COMPILE = ("-O3", "-march=native")
Run = Callable[[np.ndarray], np.ndarray]  # a batch of inputs to the batch of outputs


class DisagreementError(EastError):
    """An exported file computes something else than the network."""


def largest_difference(run: Run, model: nn.Module, masks: Mapping[str, Tensor], inputs: Tensor) -> float:
    """max |run(x) - model(x)| / max |model(x)| over a batch of inputs and all outputs; `model` is masked, in
    evaluation mode and in float32."""
    with torch.no_grad():
        expected = masked_copy(model, masks)(inputs.float()).numpy()
    difference = np.abs(run(inputs.float().numpy()).reshape(expected.shape) - expected).max()
    if difference == 0:
        return 0.0
    relative = difference / np.abs(expected).max()
    return math.inf if np.isnan(relative) else float(relative)


def verify(run: Run, model: nn.Module, masks: Mapping[str, Tensor], inputs: Tensor, what: str = "export") -> float:
    """`largest_difference`; raises `DisagreementError` where it is over 1e-5."""
    difference = largest_difference(run, model, masks, inputs)
    if difference > TOLERANCE:
        raise DisagreementError(
            f"{what} differs from the PyTorch network by {difference:.1e} of its largest output, allowed are "
            f"{TOLERANCE:.0e}: no file was left"
        )
    return difference


def run_onnx(content: bytes, threads: int = 1) -> Run:
    """An ONNX file in onnxruntime."""
    running = session(content, threads)
    return lambda inputs: running.run(None, {"input": inputs})[0]


def run_c(file: CFile, flags: Sequence[str] = COMPILE) -> Run:
    """A C file compiled by this machine's compiler (cc, gcc or clang); raises `UsageError` where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_c(file, Path(folder) / f"{file.name}.so", ("-shared", "-fPIC", *flags))
        function = getattr(ctypes.CDLL(str(library)), f"{file.name}_run")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], None

    def run(inputs: np.ndarray) -> np.ndarray:
        inputs = np.ascontiguousarray(inputs, np.float32)
        if inputs.shape[1:] != file.input_shape:
            raise UsageError(f"inputs must be a batch of shape {file.input_shape}, got {inputs.shape[1:]}")
        outputs = np.empty((len(inputs), *file.output_shape), np.float32)
        x, y = inputs.ctypes.data, outputs.ctypes.data  # bare addresses: an array a call costs as much as the call
        for i in range(len(inputs)):
            function(x + i * inputs.strides[0], y + i * outputs.strides[0])
        return outputs

    return run


def compile_c(file: CFile, path: Path, flags: Sequence[str]) -> Path:
    """Compile a C file to `path`; raises `UsageError` where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise UsageError("a C file needs a C compiler to check the file with: none of cc, gcc and clang is installed")
    source = path.with_suffix(".c")
    source.write_text(file.text)
    done = subprocess.run([compiler, *flags, str(source), "-o", str(path), "-lm"], capture_output=True, text=True)
    if done.returncode:
        raise DisagreementError(f"{compiler} does not compile the C file: {' '.join(done.stderr.split())[:200]}")
    return path
