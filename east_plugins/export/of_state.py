"""The network in a file of `--east-state` as a file of each format: what a published script trained, deployed."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..upstream import state
from .formats import load_sparse, to_c, to_onnx
from .of_run import Exported
from .safetensors import to_safetensors
from .verify import run_c, run_onnx


@dataclass(frozen=True)
class Scripted:
    """A network that a script trained, its masks, and the shape of one input."""

    model: nn.Module
    masks: dict[str, Tensor]
    input_shape: tuple[int, ...]

    def inputs(self, count: int) -> Tensor:
        """Random inputs, the same every time: a script's test data is not known here."""
        return torch.randn(count, *self.input_shape, generator=torch.Generator().manual_seed(0))


def load(path: Path, network: str | None) -> Scripted:
    """The network of a file of `--east-state`, built by `network`, a `module:function`.

    Raises `UsageError` for another file, an unfinished network, or a function that does not make it.
    """
    saved = state.read(path)
    if network is None:
        raise UsageError(
            f"{path} is a file of --east-state: --network module:function must make its {saved.network_class}"
        )
    if saved.input_shape is None:
        raise UsageError(f"{path}: the network took something else than one tensor; export needs an input's shape")
    return Scripted(saved.network(state.build(network)), saved.masks, saved.input_shape)


def exported(found: Scripted, kind: str, name: str = "network") -> Exported:
    """The network as a file of `kind` ("c", "onnx" or "safetensors"); `name` is the one of the C function.

    What the inputs are made of is the script's affair and in no file. Raises as `to_c` and `to_onnx` do.
    """
    if kind == "c":
        file = to_c(found.model, found.masks, found.input_shape, name)
        return Exported(file.text.encode(), run_c(file), f", static memory {file.arena_bytes:,} bytes of activations")
    if kind == "onnx":
        content = to_onnx(found.model, found.masks, found.input_shape)
        return Exported(content, run_onnx(content))
    content = to_safetensors(found.model, found.masks, {"input_shape": list(found.input_shape)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        model, _ = load_sparse(path, copy.deepcopy(found.model))
    return Exported(content, lambda inputs: model(torch.from_numpy(inputs)).detach().numpy())
