"""The file of `--east-state`: masks, fired weights, step, and the network's values, packed.

`read` gives it back without executing anything. `State.network` fills a network that the caller has built by his
own code, so that it can be exported and analyzed as a run's:

    state = read("state.pt")
    file = to_c(state.network(Net()), state.masks, state.input_shape)
"""

from __future__ import annotations

import importlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..plugins.transform.sharing import share
from .attachment import Attachment


@dataclass(frozen=True)
class State:
    """What a file of `--east-state` holds.

    `masks` and `fired_masks` are boolean, by the names of the script's parameters. `values` holds of every masked
    weight the active values, in the order of its flattened mask, and every other parameter and buffer whole, a tied
    one under its first name. `input_shape` is that of one input, without the batch; None where the model took
    something else than one tensor. `share_from` is that of weight sharing, None without. `finished` tells whether
    the network was at its target density with plain ReLUs.
    """

    masks: dict[str, Tensor]
    fired_masks: dict[str, Tensor]
    steps: int
    values: dict[str, Tensor]
    network_class: str
    input_shape: tuple[int, ...] | None
    share_from: int | None
    finished: bool

    def network(self, model: nn.Module) -> nn.Module:
        """Fill `model`, of the class and size that the script trained, and give it back in evaluation mode.

        Ties its weights first where the script's were shared. Raises `UsageError` for an unfinished network, and,
        before any value is changed, where names or shapes differ.
        """
        if not self.finished:
            raise UsageError(
                f"the network of step {self.steps} is unfinished: its density or its ReLUs are not the end's"
            )
        if self.share_from is not None:
            share(model, self.share_from)
        own = model.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(own.items())}
        wanted = {name for name, tensor in own.items() if first[id(tensor)] == name}
        dense = {name: self._dense(name, own[name]) for name in self.values.keys() & own.keys()}
        differing = wanted ^ self.values.keys()
        differing |= {name for name, value in dense.items() if value is None or value.shape != own[name].shape}
        if differing:
            raise UsageError(
                f"the saved {self.network_class} does not fit this {type(model).__name__}; what differs: "
                + ", ".join(sorted(differing))
            )
        model.load_state_dict(dense, strict=False)
        return model.eval()

    def _dense(self, name: str, like: Tensor) -> Tensor | None:
        """The value of a tensor in full; None where its mask does not fit it."""
        value, mask = self.values[name], self.masks.get(name)
        if mask is None:
            return value
        if int(mask.sum()) != value.numel() or mask.shape != like.shape:
            return None
        return torch.zeros(mask.shape, dtype=value.dtype).masked_scatter_(mask, value)


def build(network: str) -> nn.Module:
    """The network that `module:function` makes, the function called without arguments: the caller's word, never a
    file's. Raises `UsageError` where it cannot be had."""
    module, _, function = network.partition(":")
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the module of somebody else raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--network {network!r} cannot be built: {reason}; it must be module:function") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--network {network!r} must make an nn.Module, got {type(model).__name__}")
    return model


def gather(attachment: Attachment) -> dict[str, Any]:
    """What `read` reads: the attachment's own state, from which a host goes on, and the network's values."""
    model = attachment.model
    if model is None:
        raise UsageError("--east-state: the host was given no model")
    state = attachment.state_dict()
    masks = {name.removeprefix("module."): mask.cpu() for name, mask in state["masks"].items()}
    values: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            value = tensor.detach().cpu()
            values[name] = value[masks[name]] if name in masks else value.clone()
        seen.add(id(tensor))
    cls, shape = type(model), attachment.input_shape
    network = {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "values": values,
        "input_shape": None if shape is None else list(shape),
        "share_from": attachment.options.share_from if attachment.options.share else None,
        "finished": attachment.finished,
    }
    return {**state, "network": network}


def read(path: str | os.PathLike) -> State:
    """The state in a file of `--east-state`.

    Raises `UsageError` for a file that cannot be read, is something else, or comes from a version that saved no values.
    """
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{os.fspath(path)} is neither the folder of a run nor a file of --east-state")
    try:
        state = torch.load(Path(path), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{os.fspath(path)} cannot be read as a file of --east-state: {reason}") from error
    try:
        return _state(state, state["network"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{os.fspath(path)} holds no network of --east-state ({error})") from error


def _state(state: Mapping[str, Any], network: Mapping[str, Any]) -> State:
    def booleans(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("module."): mask.bool() for name, mask in masks.items()}

    shape, lender = network["input_shape"], network["share_from"]
    return State(
        masks=booleans(state["masks"]),
        fired_masks=booleans(state["fired_masks"]),
        steps=int(state["steps"]),
        values={str(name): value.detach() for name, value in network["values"].items()},
        network_class=str(network["class"]),
        input_shape=None if shape is None else tuple(int(size) for size in shape),
        share_from=None if lender is None else int(lender),
        finished=bool(network["finished"]),
    )
