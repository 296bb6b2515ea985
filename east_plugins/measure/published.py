"""Other people's published code, from checkouts that the user names, to be timed beside ours."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import UsageError


def itop_file(checkout: Path) -> Path:
    """The file of a checkout of ITOP that its hosts are in; raises `UsageError`."""
    file = checkout / "sparselearning" / "core.py"
    if not file.is_file():
        raise UsageError(f"`itop` {checkout} is no checkout of ITOP: it has no sparselearning/core.py")
    return file


def itop_core(checkout: Path) -> ModuleType:
    """ITOP's module of hosts, from a checkout; silent, on a machine without CUDA too."""
    spec = importlib.util.spec_from_file_location("itop_core", itop_file(checkout))
    assert spec is not None and spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    vars(core)["print"] = lambda *args: None
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    return core


def sparseprop(checkout: Path) -> Any:
    """SparseProp's module `utils` (Nikdan et al. 2023), from a checkout in which its kernels are built.

    Its kernels use as many threads as PyTorch does when they are loaded first. Raises `UsageError`.
    """
    if not (checkout / "sparseprop" / "utils.py").is_file():
        raise UsageError(f"`sparseprop` {checkout} is no checkout of SparseProp: it has no sparseprop/utils.py")
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    sys.path.insert(0, str(checkout.resolve()))
    try:
        return importlib.import_module("sparseprop.utils")
    except ImportError as error:
        raise UsageError(
            f"`sparseprop` {checkout} cannot be imported ({error}); its kernels are built by "
            "python setup.py build_ext --inplace there, and it needs scipy"
        ) from error
    finally:
        sys.path.remove(str(checkout.resolve()))


def swap_in_sparseprop(checkout: Path, model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Put SparseProp's layers in place of the model's where it finds them faster, with its own defaults; `input_shape`
    has the batch in front."""
    utils = sparseprop(checkout)
    with contextlib.redirect_stdout(io.StringIO()):
        utils.swap_modules_with_sparse(model, input_shape, inplace=True)
