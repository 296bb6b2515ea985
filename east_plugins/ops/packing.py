"""States of sparse networks in few bytes: what is mostly zero is kept by the places of what is not, bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Marks a dictionary that stands for a tensor; its value is the version of the form.
KEY = "__packed__"
LARGEST = 2**33  #: numbers in one packed tensor: a file of few bytes must not take all memory
_SMALLEST = 1024  # smaller tensors gain nothing
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(state: Any) -> Any:
    """`state` with each strided tensor in it that takes less so in its packed form; dictionaries, lists and tuples are
    gone through, and everything else stays as it is.

    A tensor is packed losslessly: as the places and values whose bits are not all zero (a negative zero is a value), or
    for truth values, where that is shorter, as one bit each.
    """
    if isinstance(state, dict):
        return _mapped(pack, state)
    if isinstance(state, (list, tuple)):
        return type(state)(pack(value) for value in state)
    if isinstance(state, Tensor) and state.numel() >= _SMALLEST and state.layout == torch.strided:
        return _packed(state.detach()) or state
    return state


def _mapped(change: Callable[[Any], Any], state: dict[Any, Any]) -> dict[Any, Any]:
    """A copy, its attributes too (a state dict has its versions in one), with every value changed."""
    found = copy.copy(state)
    for key, value in state.items():
        found[key] = change(value)
    return found


def _packed(tensor: Tensor) -> dict[str, Any] | None:
    """The shortest form of a tensor; None where that is the tensor itself."""
    size = tensor.element_size()
    if size not in _INTEGERS or tensor.is_quantized:
        return None
    flat = tensor.reshape(-1)
    places = flat.view(_INTEGERS[size]).nonzero().flatten()
    if tensor.numel() < 2**31:
        places = places.int()
    truth = tensor.dtype == torch.bool
    sparse = places.nbytes + (0 if truth else len(places) * size)
    if min(sparse, tensor.numel() / 8 if truth else sparse) > 0.75 * tensor.nbytes:
        return None
    form: dict[str, Any] = {KEY: 1, "shape": list(tensor.shape)}
    if not truth:
        return {**form, "places": places, "values": flat[places.long()]}
    if sparse < tensor.numel() / 8:
        return {**form, "places": places}
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=tensor.device)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8))
    return {**form, "bits": (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)}


def unpack(state: Any) -> Any:
    """What `pack` was given. Raises `ValueError` for a packed form that cannot be."""
    if isinstance(state, dict):
        return _unpacked(state) if KEY in state else _mapped(unpack, state)
    if isinstance(state, (list, tuple)):
        return type(state)(unpack(value) for value in state)
    return state


def _unpacked(form: Mapping[str, Any]) -> Tensor:
    if form[KEY] != 1:
        raise ValueError(f"packed tensors of version {form[KEY]}, known is 1: a newer east_plugins wrote them")
    shape = form["shape"]
    numel = math.prod(shape)
    if not 0 <= numel <= LARGEST:
        raise ValueError(f"packed tensor of shape {shape}; the most that is read are {LARGEST:,} numbers")
    if "bits" in form:
        weights = 2 ** torch.arange(8, dtype=torch.uint8, device=form["bits"].device)
        bits = (form["bits"][:, None] & weights).bool().flatten()
        if not 0 <= len(bits) - numel < 8:
            raise ValueError(f"packed tensor of shape {shape} has {len(bits)} bits")
        return bits[:numel].view(shape)
    places = form["places"].long()
    values = form.get("values", torch.ones((), dtype=torch.bool, device=places.device))
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < numel:
        raise ValueError(f"packed tensor of shape {shape} has places outside it")
    flat = torch.zeros(numel, dtype=values.dtype, device=places.device)
    flat[places] = values
    return flat.view(shape)
