"""The network of a script of somebody's own, saved by `run --east-state`, as a file of each format."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..upstream import state
from .of_run import Exported, c_file, onnx_file, sparse_file


@dataclass
class Scripted:
    """What a file of `--east-state` says, in place of a run. Inputs of a script are not known: random ones check it."""

    model: nn.Module
    masks: dict[str, Tensor]
    input_shape: tuple[int, ...]

    def inputs(self, count: int) -> Tensor:
        """`count` random inputs, the same ones in every call."""
        return torch.randn(count, *self.input_shape, generator=torch.Generator().manual_seed(0))


def read(path: Path, network: str | None) -> Scripted:
    """The trained network of a file of `--east-state`; `network` is a `module:function` that makes an untrained one.

    Raises `UsageError` where the file is none, or says too little.
    """
    saved = state.read(path)
    if network is None:
        raise UsageError(
            f"{path} is a file of --east-state: --network module:function must make its {saved.network_class}"
        )
    if saved.input_shape is None:
        raise UsageError(f"{path}: the network took something else than one tensor; export needs an input's shape")
    return Scripted(saved.network(state.build(network)), saved.masks, saved.input_shape)


def exported(scripted: Scripted, kind: str, name: str = "network") -> Exported:
    """The file of `kind` ("c", "onnx" or "safetensors"); raises as `of_run.exported`."""
    model, masks, shape = scripted.model, scripted.masks, scripted.input_shape
    if kind == "c":
        return c_file(model, masks, shape, name)
    if kind == "onnx":
        return onnx_file(model, masks, shape)
    if kind != "safetensors":
        raise UsageError(f"kind of file {kind!r}; allowed are c, onnx, safetensors")
    return sparse_file(model, masks, {"input_shape": list(shape)}, copy.deepcopy(model))
