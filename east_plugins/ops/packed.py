"""An optimizer step on active values only, with the user's own optimizer and its own numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .active import Active


class PackedState:
    """Keeps an optimizer's state of chosen parameters packed: one value for each active weight.

    While `stepping`, such a parameter is for the optimizer the vector of its active values, with their gradients and
    their state; every optimizer that works element by element then gives the numbers that it gives on the dense
    tensor, for the cost of the active ones. Between steps the parameter is dense, in its own memory. The optimizer's
    `state_dict()` shows dense state as ever, and `load_state_dict()` takes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._active: dict[nn.Parameter, Active] = {}
        optimizer.register_state_dict_post_hook(self._dense_state_dict)
        optimizer.register_load_state_dict_post_hook(lambda optimizer: self._active.clear())

    @contextlib.contextmanager
    def stepping(self, sets: Mapping[nn.Parameter, Active | None]) -> Iterator[None]:
        """Inside, the parameters are vectors of their active values, or with None dense. They have gradients."""
        whole = []
        try:
            for parameter, active in sets.items():
                if active is None:
                    self._unpack_state(parameter)
                    continue
                self._pack_state(parameter, active)
                whole.append((parameter, active, parameter.data, parameter.grad))
                values, gradient = active.values(parameter.data), active.values(parameter.grad)
                parameter.grad = None
                parameter.data = values
                parameter.grad = gradient
            yield
        finally:
            for parameter, active, data, gradient in whole:
                data[active.coordinates] = parameter.data
                parameter.grad = None
                parameter.data = data
                parameter.grad = gradient

    def move(self, parameter: nn.Parameter, active: Active) -> None:
        """Bring packed state to another active set: dropped with pruned weights, zero for grown ones."""
        if parameter in self._active:
            self._pack_state(parameter, active)

    def _pack_state(self, parameter: nn.Parameter, active: Active) -> None:
        before = self._active.get(parameter)
        if before is active:
            return
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if before is not None and _is_packed(value, before):
                state[name] = before.moved(value, active)
            elif _is_dense(value, parameter):
                state[name] = active.values(value)
        self._active[parameter] = active

    def _unpack_state(self, parameter: nn.Parameter) -> None:
        if (before := self._active.pop(parameter, None)) is not None:
            state = self.optimizer.state.get(parameter, {})
            state.update({n: before.spread(value) for n, value in state.items() if _is_packed(value, before)})

    def _dense_state_dict(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        theirs = [index for group in saved["param_groups"] for index in group["params"]]
        states = dict(saved["state"])
        for parameter, index in zip(ours, theirs, strict=True):
            if index in states and (active := self._active.get(parameter)) is not None:
                states[index] = {
                    name: active.spread(value) if _is_packed(value, active) else value
                    for name, value in states[index].items()
                }
        return {**saved, "state": states}


def _is_packed(value: Any, active: Active) -> bool:
    return isinstance(value, Tensor) and value.shape == (len(active),)


def _is_dense(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
