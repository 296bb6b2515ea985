"""Sparse networks as safetensors files: only active weights, with the gaps between them, and JSON metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MissingExtraError, UsageError
from ..ops.files import digest
from .unwrapped import unwrapped

FORMAT = "east_plugins sparse 2"
WITHOUT_DIGEST = "east_plugins sparse 1"  # files of version 0.1
LARGEST = 2**34  #: weights that a file may say it holds
VALUES, GAPS = ".values", ".gaps"


def to_safetensors(model: nn.Module, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    """The file that holds a network's state dict, its masked weights sparse and shared ones once.

    A masked weight NAME is two tensors: NAME.values, the active values in their order in memory, and NAME.gaps, for
    each of them the inactive ones before it, as the least unsigned integer type that holds them all. All other
    tensors lie there as they are. `metadata`, of JSON types, is kept with the file. Of a wrapped model it is the file
    of the network inside. Raises `UsageError` for masks as `unwrapped`.
    """
    model, masks = unwrapped(model, masks)
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in state.items():
        first = names.setdefault(id(tensor), name)
        tensor = tensor.detach().cpu().contiguous()
        if first != name:
            aliases[name] = first
        elif name in masks:
            mask = masks[name].cpu()
            active = mask.flatten().nonzero().flatten().numpy()
            gaps = np.diff(active, prepend=-1) - 1
            tensors[name + VALUES] = tensor[mask]
            tensors[name + GAPS] = torch.from_numpy(gaps.astype(np.min_scalar_type(gaps.max(initial=0))))
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor
    header = {"format": FORMAT, "shapes": shapes, "aliases": aliases, "network": dict(metadata or {})}
    header["digest"] = _digest(tensors, header)
    return _torch().save(tensors, {key: json.dumps(value) for key, value in header.items()})


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """State dict, masks and metadata of a file made by `to_safetensors`, bit for bit; inactive weights are 0.

    Raises `UsageError` where the file is missing, damaged or another's.
    """
    _torch()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())}") from error
    if header.get("format") not in (FORMAT, WITHOUT_DIGEST):
        raise UsageError(f"{path} is no file of export --format safetensors")
    if header["format"] == FORMAT and header.pop("digest", None) != _digest(state, header):
        raise UsageError(f"{path} is damaged: its content is not what its digest is of")
    try:
        if sum(math.prod(shape) for shape in header["shapes"].values()) > LARGEST:
            raise UsageError(f"{path} says that it holds more than {LARGEST:,} weights, the most that is read")
        masks = _fill(state, header["shapes"])
        state |= {name: state[first] for name, first in header["aliases"].items()}
        return state, masks, header["network"]
    except (KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: its tensors do not fit its metadata ({error})") from error


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Of everything in a file: tensors by name, and the header without its digest."""
    said = torch.frombuffer(bytearray(json.dumps(header, sort_keys=True), "utf-8"), dtype=torch.uint8)
    return digest({**tensors, "the header": said})


def _fill(state: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Put full weights in place of values and gaps; returns their masks."""
    masks = {}
    for name, shape in shapes.items():
        values, gaps = state.pop(name + VALUES), state.pop(name + GAPS)
        active = torch.from_numpy(np.cumsum(gaps.numpy().astype(np.int64) + 1) - 1)
        masks[name] = torch.zeros(shape, dtype=torch.bool)
        masks[name].view(-1)[active] = True
        state[name] = torch.zeros(shape, dtype=values.dtype)
        state[name].view(-1)[active] = values
    return masks


def _torch():
    """The module safetensors.torch; raises `MissingExtraError`."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("safetensors is not installed: pip install 'east_plugins[export]'") from error
    return safetensors.torch
