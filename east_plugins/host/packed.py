"""An optimizer step on active values only, with the user's own optimizer and its own numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.active import Active, All

State = dict[str, Any]


#: Other parameters with fewer numbers, such as those of norms, join the active weights' vector on the CPU: a copy of
#: them costs less than a call for each.
SMALL = 4096


class Copies:
    """Active entries of tensors, to and from one vector.

    Args:
        sets: the active set of every tensor, in the vector's order.
    """

    def __init__(self, sets: Sequence[Active | All]):
        self.sets, self.sizes = sets, [len(active) for active in sets]

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([active.values(tensor) for active, tensor in zip(self.sets, tensors, strict=True)])

    def write(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        whole, parts = [], []
        for active, tensor, part in zip(self.sets, tensors, values.split(self.sizes), strict=True):
            if isinstance(active, All):
                whole.append(tensor)
                parts.append(part if len(active.shape) == 1 else part.view(active.shape))
            else:
                active.put(tensor, part)
        if whole:
            torch._foreach_copy_(whole, parts)


class PackedState:
    """Keeps an optimizer's state of chosen parameters packed: one value for each active weight.

    While `stepping`, the optimizer sees one vector in each param group in place of these parameters and of small ones
    beside them: their active values one after the other, with their gradients and their state. Every optimizer that
    works element by element then gives the numbers that it gives on the dense tensors, for the cost of the active ones
    and of one tensor. Between steps the parameters are dense, in their own memory. The optimizer's `state_dict()` shows
    dense state as ever, and `load_state_dict()` takes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.copies = Copies  #: how active values are read and written; an engine knows a faster way
        self._states: dict[nn.Parameter, tuple[Active | All, State]] = {}
        self.written: list[nn.Parameter] = []  #: whose active values somebody else changed since the last step
        self.loaded = False  #: whether the optimizer's state was loaded since this was last set to False
        self._left: dict[nn.Parameter, Tensor] = {}
        self._planned_for: list = []
        self._plan: list[tuple[list[_Vector], list[nn.Parameter]]] = []
        optimizer.register_state_dict_post_hook(self._dense_state_dict)
        optimizer.register_load_state_dict_post_hook(self._forget)

    @contextlib.contextmanager
    def stepping(self, sets: Mapping[nn.Parameter, Active | None]) -> Iterator[None]:
        """Inside, parameters with an active set are parts of a vector; those with None are dense. All of them have
        gradients."""
        if not (self._states or self._left or any(active is not None for active in sets.values())):
            yield  # on an accelerator, say: nothing is packed
            return
        groups = self.optimizer.param_groups
        given: list[Any] = [(id(p), p.grad is None, p.dtype) for group in groups for p in group["params"]]
        given += [self.copies, *map(id, sets), *map(id, sets.values())]
        if given != self._planned_for:
            present = {parameter for group in groups for parameter in group["params"]}
            self._states = {p: state for p, state in self._states.items() if p in present}
            self._plan = [self._planned(group["params"], sets) for group in groups]
            self._planned_for = given
        with contextlib.ExitStack() as stack:
            for group, (vectors, dense) in zip(groups, self._plan, strict=True):
                stack.enter_context(self._as_vectors(vectors, dense, group))
            yield

    def _planned(
        self, parameters: list[nn.Parameter], sets: Mapping[nn.Parameter, Active | None]
    ) -> tuple[list[_Vector], list[nn.Parameter]]:
        """The vectors of a group, and what is stepped densely beside them. There is one vector for a kind of tensors,
        unless some parameters have made fewer steps than others."""
        dense: list[nn.Parameter] = []
        vectors: dict[tuple, dict[nn.Parameter, tuple[Active | All, State]]] = {}
        small = any(active is not None for active in sets.values())
        for parameter in parameters:
            active: Active | All | None = sets.get(parameter)
            if parameter not in sets and small and _is_small(parameter):
                active = All(parameter.shape)
            if active is None:
                self._unpack(parameter)
                dense.append(parameter)
            else:
                state = self._packed_state(parameter, active)
                left = self._left.pop(parameter, None)
                if left is not None and not torch.equal(left, active.values(parameter.detach())):
                    self.written.append(parameter)
                kind = parameter.device, parameter.dtype, _age(state)
                vectors.setdefault(kind, {})[parameter] = active, state
        return [_Vector(parts, self.copies) for parts in vectors.values()], dense

    @contextlib.contextmanager
    def _as_vectors(self, vectors: list[_Vector], dense: list[nn.Parameter], group: dict[str, Any]) -> Iterator[None]:
        wholes = [vector.whole() for vector in vectors]
        self.written += [parameter for vector in vectors if vector.written for parameter in vector.parameters]
        before = {"params": group["params"]} | ({"foreach": None} if vectors and _may_use_foreach(group) else {})
        group["params"] = wholes + dense
        if "foreach" in before:  # many small tensors: one call for all of them
            group["foreach"] = True
        self.optimizer.state.update((w, v.state) for w, v in zip(wholes, vectors, strict=True) if v.state)
        try:
            yield
        finally:
            group.update(before)
            for whole, vector in zip(wholes, vectors, strict=True):
                vector.state = self.optimizer.state.pop(whole, {})
                self._states.update(vector.states())
                vector.put(whole)

    def move(self, parameter: nn.Parameter, active: Active | All) -> None:
        """Bring packed state to another active set: dropped with pruned weights, zero for grown ones."""
        if parameter in self._states and self._states[parameter][0] != active:
            before, state = self._states[parameter]
            self._states[parameter] = (
                active,
                {
                    name: before.moved(value, active) if _is_packed(value, before) else value
                    for name, value in state.items()
                },
            )

    def _packed_state(self, parameter: nn.Parameter, active: Active | All) -> State:
        """The state of a parameter at its active set, taken from the optimizer where it is still dense there."""
        dense = self.optimizer.state.pop(parameter, None)
        if dense is not None:
            state = {name: active.values(v) if _is_dense(v, parameter) else v for name, v in dense.items()}
            self._states[parameter] = active, state
        self.move(parameter, active)
        return self._states.get(parameter, (active, {}))[1]

    def _unpack(self, parameter: nn.Parameter) -> None:
        if parameter in self._states:
            self.optimizer.state[parameter] = _spread(parameter, *self._states.pop(parameter))

    def unpack(self) -> None:
        """Give all state back to the optimizer, dense."""
        for parameter in list(self._states):
            self._unpack(parameter)
        self._planned_for.clear()

    def remember(self, sets: Mapping[nn.Parameter, Active]) -> None:
        """Note the active values as they are, where the next step is planned anew."""
        self._left = {p: active.values(p.detach()) for p, active in sets.items() if p in self._states}

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        self.loaded = True
        self._states.clear()
        self._planned_for.clear()

    def _dense_state_dict(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        theirs = [index for group in saved["param_groups"] for index in group["params"]]
        packed = {
            index: _spread(parameter, *self._states[parameter])
            for parameter, index in zip(ours, theirs, strict=True)
            if parameter in self._states
        }
        state = saved["state"] | packed
        return {**saved, "state": {index: state[index] for index in theirs if index in state}}


class _Vector:
    """The active values of some parameters with their state, one parameter after the other."""

    def __init__(self, parts: Mapping[nn.Parameter, tuple[Active | All, State]], copies: type[Copies]):
        sets, states = map(list, zip(*parts.values(), strict=True))
        self.parameters, self.copies = list(parts), copies(sets)
        self.state: State = {
            name: torch.cat([state[name] for state in states]) if _has_entries(value) else value
            for name, value in states[0].items()
        }
        self._seen: list[int] = []
        self._left: Tensor | None = None
        self.written = False  #: whether the values were others than those that were left, at the last look

    @torch.no_grad()
    def whole(self) -> nn.Parameter:
        """The values as they are now, with their gradient."""
        values = self.copies.read(self.parameters)
        self.written = self._left is not None and values.is_cpu and not torch.equal(values, self._left)
        whole = nn.Parameter(values)
        whole.grad = self.copies.read([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        return whole

    @torch.no_grad()
    def put(self, whole: nn.Parameter) -> None:
        """Write the values to where they belong."""
        self._left = whole.detach()
        self.copies.write(self.parameters, self._left)

    def states(self) -> dict[nn.Parameter, tuple[Active | All, State]]:
        """The state of every parameter, as views; empty where the tensors are those of the last call."""
        seen = [id(value) for value in self.state.values()]
        if seen == self._seen:
            return {}
        self._seen = seen
        sizes, sets = self.copies.sizes, self.copies.sets
        split = {n: value.split(sizes) if _has_entries(value) else None for n, value in self.state.items()}
        return {
            parameter: (active, {name: parts[i] if parts else self.state[name] for name, parts in split.items()})
            for i, (parameter, active) in enumerate(zip(self.parameters, sets, strict=True))
        }


def _has_entries(value: Any) -> bool:
    """Whether a part of an optimizer's state has an entry for every weight; its counters have not."""
    return isinstance(value, Tensor) and value.dim() > 0


def _may_use_foreach(group: Mapping[str, Any]) -> bool:
    numbers = not any(isinstance(value, Tensor) for value in (group.get("lr"), *group.get("betas", ())))
    return "foreach" in group and group["foreach"] is None and not group.get("fused") and numbers


def _is_small(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.numel() <= SMALL and parameter.is_cpu and parameter.dim() > 0


def _age(state: State) -> float | None:
    """Steps that an optimizer has counted for a parameter, 0 where it counts none; None before the first one."""
    return float(state.get("step", 0)) if state else None


def _spread(parameter: nn.Parameter, active: Active | All, state: State) -> State:
    """Dense state of one parameter in its memory format, all its own: a step counter is the whole vector's."""
    return {n: _dense_like(parameter, active.spread(v)) if _is_packed(v, active) else copy.deepcopy(v)
            for n, v in state.items()}  # fmt: skip


def _dense_like(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Fused optimizers take state of their parameter's strides only."""
    same = values.stride() == parameter.stride()
    return values if same else torch.empty_like(parameter, dtype=values.dtype, requires_grad=False).copy_(values)


def _is_packed(value: Any, active: Active | All) -> bool:
    return isinstance(value, Tensor) and value.shape == (len(active),)


def _is_dense(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
