"""Chains of element-wise operations as few kernels on a GPU, by torch.compile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_failed: set[Callable] = set()


def fused(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)`, compiled where the first tensor is on a CUDA device.

    Compiled once for tensors of all sizes. Where it cannot be compiled (no Triton, no C compiler) the function runs as
    it is, and one warning says so.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()  # a compiled function has one derivative only
    if plain or not tensors[0].is_cuda or function in _failed:
        return function(*tensors)
    try:
        return _compiled(function)(*tensors)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _failed.add(function)
        logger.warning("%s runs unfused, slower: %s", function.__name__, str(error).strip().splitlines()[0])
        return function(*tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)
