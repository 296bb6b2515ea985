"""An optimizer step on active values only, with the user's own optimizer and its own numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .active import Active

State = dict[str, Any]


class PackedState:
    """Keeps an optimizer's state of chosen parameters packed: one value for each active weight.

    While `stepping`, the optimizer sees one vector in each param group in place of these parameters: their active
    values one after the other, with their gradients and their state. Every optimizer that works element by element
    then gives the numbers that it gives on the dense tensors, for the cost of the active ones and of one tensor.
    Between steps the parameters are dense, in their own memory. The optimizer's `state_dict()` shows dense state as
    ever, and `load_state_dict()` takes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._states: dict[nn.Parameter, tuple[Active, State]] = {}
        self._vectors: dict[tuple, _Vector] = {}
        optimizer.register_state_dict_post_hook(self._dense_state_dict)
        optimizer.register_load_state_dict_post_hook(lambda optimizer: self._forget())

    @contextlib.contextmanager
    def stepping(self, sets: Mapping[nn.Parameter, Active | None]) -> Iterator[None]:
        """Inside, parameters with an active set are parts of a vector; those with None are dense. All of them have
        gradients."""
        with contextlib.ExitStack() as stack:
            for index, group in enumerate(self.optimizer.param_groups):
                kinds: dict[tuple, dict[nn.Parameter, Active]] = {}
                for parameter in [parameter for parameter in group["params"] if parameter in sets]:
                    if sets[parameter] is None:
                        self._unpack(parameter)
                    else:
                        kind = (index, parameter.device, parameter.dtype)
                        kinds.setdefault(kind, {})[parameter] = sets[parameter]
                for kind, packed in kinds.items():
                    stack.enter_context(self._as_vector(kind, group, packed))
            yield

    @contextlib.contextmanager
    def _as_vector(self, kind: tuple, group: dict[str, Any], packed: dict[nn.Parameter, Active]) -> Iterator[None]:
        vector = self._vectors.get(kind)
        if vector is None or vector.sets != packed:
            vector = self._vectors[kind] = _Vector(packed, self._packed_states(packed))
        whole = nn.Parameter(torch.cat([active.values(parameter.data) for parameter, active in packed.items()]))
        whole.grad = torch.cat([active.values(parameter.grad) for parameter, active in packed.items()])
        before = {"params": group["params"]} | ({"foreach": None} if _may_use_foreach(group) else {})
        group["params"] = [whole, *(parameter for parameter in group["params"] if parameter not in packed)]
        if "foreach" in before:  # many small tensors: one call for all of them
            group["foreach"] = True
        if vector.state:
            self.optimizer.state[whole] = vector.state
        try:
            yield
        finally:
            group.update(before)
            vector.state = self.optimizer.state.pop(whole, {})
            self._states.update(vector.parts())
            for (parameter, active), values in zip(packed.items(), whole.data.split(vector.sizes), strict=True):
                active.put(parameter.data, values)

    def move(self, parameter: nn.Parameter, active: Active) -> None:
        """Bring packed state to another active set: dropped with pruned weights, zero for grown ones."""
        if parameter in self._states and self._states[parameter][0] is not active:
            before, state = self._states[parameter]
            self._states[parameter] = active, {
                name: before.moved(value, active) if _is_packed(value, before) else value
                for name, value in state.items()
            }

    def _packed_states(self, packed: Mapping[nn.Parameter, Active]) -> list[State]:
        """The state of each parameter at its active set, taken from the optimizer where it is still dense there."""
        for parameter, active in packed.items():
            dense = self.optimizer.state.pop(parameter, None)
            if dense is not None:
                state = {n: active.values(v) if _is_dense(v, parameter) else v for n, v in dense.items()}
                self._states[parameter] = active, state
            self.move(parameter, active)
        return [self._states.get(parameter, (active, {}))[1] for parameter, active in packed.items()]

    def _unpack(self, parameter: nn.Parameter) -> None:
        if parameter in self._states:
            self.optimizer.state[parameter] = _spread(*self._states.pop(parameter))

    def _forget(self) -> None:
        self._states.clear()
        self._vectors.clear()

    def _dense_state_dict(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        theirs = [index for group in saved["param_groups"] for index in group["params"]]
        packed = {
            index: _spread(*self._states[parameter])
            for parameter, index in zip(ours, theirs, strict=True)
            if parameter in self._states
        }
        state = saved["state"] | packed
        return {**saved, "state": {index: state[index] for index in theirs if index in state}}


class _Vector:
    """The state of some parameters' active values, one after the other."""

    def __init__(self, sets: dict[nn.Parameter, Active], states: Sequence[State]):
        self.sets, self.sizes = sets, [len(active) for active in sets.values()]
        self.state: State = {}
        first = next((state for state in states if state), {})
        for name, value in first.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                parts = zip(states, self.sizes, strict=True)
                self.state[name] = torch.cat([s[name] if s else value.new_zeros(size) for s, size in parts])
            else:
                self.state[name] = value
        self._seen: list[int] = []

    def parts(self) -> dict[nn.Parameter, tuple[Active, State]]:
        """The state of every parameter, as views; empty where the tensors are those of the last call."""
        seen = [id(value) for value in self.state.values()]
        if seen == self._seen:
            return {}
        self._seen = seen
        split = {
            name: value.split(self.sizes) if isinstance(value, Tensor) and value.dim() == 1 else None
            for name, value in self.state.items()
        }
        return {
            parameter: (active, {name: parts[i] if parts else self.state[name] for name, parts in split.items()})
            for i, (parameter, active) in enumerate(self.sets.items())
        }


def _may_use_foreach(group: Mapping[str, Any]) -> bool:
    return "foreach" in group and group["foreach"] is None and not group.get("fused")


def _spread(active: Active, state: State) -> State:
    """Dense state of one parameter, all its own: a step counter is one for the whole vector."""
    return {n: active.spread(v) if _is_packed(v, active) else copy.deepcopy(v) for n, v in state.items()}


def _is_packed(value: Any, active: Active) -> bool:
    return isinstance(value, Tensor) and value.shape == (len(active),)


def _is_dense(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
