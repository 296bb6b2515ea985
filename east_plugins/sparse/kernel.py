"""The compiled kernels (`*.c` beside this file): built with the machine's C compiler at first use."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
REAL = {torch.float32: "float", torch.float64: "double"}
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC")


class Geometry(ctypes.Structure):
    """`Geometry` of taps.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "images", "height", "width", "source_height", "source_width", "kernel_height", "kernel_width", "most",
        )),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
    ]  # fmt: skip


class Pass(ctypes.Structure):
    """`Pass` of blocks.c."""

    _fields_ = [
        (name, ctypes.c_int32) for name in (
            "images", "rows", "columns", "first_row", "first_column", "row_step", "column_step",
            "height", "width", "source_height", "source_width", "row_stride", "column_stride",
            "top", "bottom", "left", "right", "row_phases", "column_phases",
        )
    ]  # fmt: skip


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor's numbers; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for float32 or float64; None, with a warning, where it cannot be compiled.

    The compiler is `$CC` or else cc, gcc or clang.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        logger.warning("no C compiler found (cc, gcc, clang or $CC): sparse convolutions run in plain PyTorch")
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ctypes.CDLL(str(_compile(compiler, REAL[dtype], Path(folder))))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            cause = next((line for line in said if "error" in line), *said[-1:])
            logger.warning("%s cannot compile the sparse kernels (%s): plain PyTorch instead", compiler, cause)
            return None


def _compile(compiler: str, real: str, folder: Path) -> Path:
    """The shared library. Its OpenMP is the one that PyTorch has loaded, whose threads are warm; a library of its own
    would wake a second team on the same cores."""
    library = folder / "kernels.so"
    for openmp in (["-fopenmp"], []):
        objects = [str(folder / source.stem) + ".o" for source in SOURCES]
        commands = [
            [compiler, *FLAGS, *openmp, f"-DREAL={real}", "-c", str(source), "-o", out]
            for source, out in zip(SOURCES, objects, strict=True)
        ]
        commands.append([compiler, "-shared", *objects, "-lm", "-o", str(library)])
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(library), mode=os.RTLD_NOW)
            return library
        except (OSError, subprocess.CalledProcessError):
            if not openmp:
                raise
    raise AssertionError("unreachable")
