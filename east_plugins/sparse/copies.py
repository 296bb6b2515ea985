"""Compiled copies of the active entries of many tensors at once, for the host's optimizer steps."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..host.packed import Copies
from ..ops.active import Active, All
from . import kernel


class CompiledCopies(Copies):
    """The same in one call for all tensors, where the kernels are there for them."""

    def __init__(self, sets: Sequence[Active | All]):
        super().__init__(sets)
        self.begin = torch.tensor([0, *itertools.accumulate(self.sizes)])
        self._places: dict[Any, tuple[ctypes.Array, list[Tensor | None]]] = {}

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        if not _suit(tensors):
            return super().read(tensors)
        out = tensors[0].new_empty(sum(self.sizes))
        self._call("gather_parts", tensors, out)
        return out

    def write(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        if not _suit(tensors):
            return super().write(tensors, values)
        self._call("scatter_parts", tensors, values)
        torch.autograd.graph.increment_version(tensors)

    def _call(self, function: str, tensors: Sequence[Tensor], vector: Tensor) -> None:
        copy = getattr(kernel.load(vector.dtype), function)
        copy(
            ctypes.c_int64(len(tensors)),
            kernel.pointer(self.begin),
            self._addresses_of_places(tensors),
            (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors)),
            kernel.pointer(vector),
        )

    def _addresses_of_places(self, tensors: Sequence[Tensor]) -> ctypes.Array:
        """Where every tensor's places in memory are listed; found once for tensors that lie alike."""
        layout = all(map(Tensor.is_contiguous, tensors)) or tuple(map(Tensor.stride, tensors))
        if layout not in self._places:
            places = [active.places(tensor) for active, tensor in zip(self.sets, tensors, strict=True)]
            addresses = (None if place is None else place.data_ptr() for place in places)
            self._places[layout] = (ctypes.c_void_p * len(places))(*addresses), places
        return self._places[layout][0]


def _suit(tensors: Sequence[Tensor]) -> bool:
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = dtypes.pop()
    return not dtypes and tensors[0].is_cpu and dtype in kernel.REAL and kernel.load(dtype) is not None
