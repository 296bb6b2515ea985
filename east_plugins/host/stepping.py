"""An optimizer step that moves active weights only: packed where few are active, else with masked gradients."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.active import Active
from .gradients import MaskedGradients
from .layers import MaskedWeight
from .optimizer_state import all_state_tensors, held_by, is_elementwise
from .packed import PackedState
from .watch import Watch

#: Layers of a smaller active share are stepped packed on the CPU; all others dense with masked gradients, which on an
#: accelerator costs fewer operations and keeps a CUDA graph of a step valid when the topology changes.
PACK_BELOW = 0.1


class Stepping:
    """Steps of one optimizer over the weights of a host.

    Every supported optimizer leaves a weight at zero that has zero gradient and zero state, so that it is enough to
    mask the gradients; after a step of a subclass, which may do anything, weights and state are masked as well. What
    somebody else wrote to weights, masks or state is masked before the step.

    Attributes:
        optimizer: of a known class, or derived from one.
        packed: the optimizer's state of the weights that are stepped packed.
        masked: which gradients were masked.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, records: Mapping[str, MaskedWeight]):
        self.optimizer, self.records = optimizer, records
        self.packed = PackedState(optimizer)
        self.masked = MaskedGradients()
        self._watch = Watch(records)
        self.others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._dense: dict[str, Tensor] = {}
        self._seen: list = []  # what the two below depend on
        self._sets: dict[nn.Parameter, Active | None] = {}
        self._probed: list[str] = []

    @contextlib.contextmanager
    def prepared(self, keep_dense: bool, engine: Any) -> Iterator[None]:
        """Inside, the optimizer's step moves active weights only. `keep_dense` keeps the gradients as they were before
        they are masked, for `dense_gradients`; `engine` is the sparse engine, where one is attached."""
        seen = self._look()
        self.mask_what_others_wrote(look_at_masks=seen != self._seen)
        if seen != self._seen:
            self._sets, self._probed, self._seen = *self._split(), seen
        sets, dense = self._sets, [name for name in self._probed if not (engine and engine.masks_gradient(name))]
        self._dense = {}
        if keep_dense:
            self.keep_dense(dense, engine)
        self._mask_gradients(dense)
        with self.packed.stepping(sets):
            if self.packed.written:  # in ways that leave no trace but the values
                self._mask_weights(self.packed.written)
                self.packed.written = []
            yield
        if not is_elementwise(self.optimizer):
            self.mask(self.records.values())

    def keep_dense(self, names: Iterable[str], engine: Any) -> None:
        """Keep gradients for `dense_gradients`: those of these names as they are now, and what the engine has."""
        self._dense = {name: grad.clone() for name, grad in self.gradients(names).items()}
        if engine is not None:
            self._dense |= engine.dense_gradients()

    @contextlib.contextmanager
    def dense_gradients(self, others: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Inside, gradients are dense again that the last step masked, or are `others`."""
        self._dense |= others or {}
        for name, grad in self._dense.items():
            self.records[name].weight.grad = grad
        yield
        self._mask_gradients(self._dense)
        self._dense = {}

    def with_closure(self, closure: Callable, prepared: Callable[[], contextlib.AbstractContextManager]) -> Any:
        """The optimizer's `step(closure)`, prepared once the closure has made the gradients."""
        with contextlib.ExitStack() as stack:

            def then_prepared() -> Any:
                with torch.enable_grad():
                    loss = closure()
                stack.enter_context(prepared())
                return loss

            return self.optimizer.step(then_prepared)

    @torch.no_grad()
    def mask(self, records: Iterable[MaskedWeight], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set inactive weights to zero, and their state in the optimizer, or in another one."""
        records = list(records)
        for record in records:
            for tensor in (record.weight, *all_state_tensors(optimizer or self.optimizer, record.weight)):
                tensor.masked_fill_(~record.mask, 0)
            self.packed.move(record.weight, record.active)
            record.written = False
        self.masked.follow({record.name: record.mask for record in records})
        self._watch.left([record.name for record in records])

    def mask_after(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the weights that another optimizer holds, after a step of its; topology updates know it from now on."""
        held = held_by(optimizer)
        if records := [record for record in self.records.values() if id(record.weight) in held]:
            self.others.add(optimizer)
            self.mask(records, optimizer)

    def all_states(self, weight: Tensor) -> Iterator[Tensor]:
        """The dense state of a weight in all optimizers that are known to step it."""
        for optimizer in (self.optimizer, *self.others):
            yield from all_state_tensors(optimizer, weight)

    def left(self, updated: bool = False) -> None:
        """Note how the weights are left; `updated`: after a topology update."""
        self._watch.left(probed=self._probed)
        if updated:
            self.packed.remember({record.weight: record.active for record in self.records.values()})

    def gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gradients by name, of the weights that have one."""
        grads = {name: self.records[name].weight.grad for name in (self.records if names is None else names)}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def check_dense(self, engine: Any) -> None:
        """Raise `UsageError` where gradients, as they are, are those of active weights alone."""
        for name, record in self.records.items():
            if self.masked.has_masked(name, record.weight.grad) or (engine and engine.holds_gradient(name)):
                raise UsageError(
                    f"truncate_weights: the gradient of {name} was masked by step() already; "
                    "call it after backward() and before step(), or use update_frequency"
                )

    def mask_what_others_wrote(self, look_at_masks: bool = True) -> None:
        """Mask weights and state that somebody else wrote to, or whose masks were."""
        if self.packed.loaded:
            self.packed.loaded = False
            self.mask(self.records.values())
        elif written := self._watch.written(look_at_masks):
            self.mask([self.records[name] for name in written])

    def _mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        wanted = {id(parameter) for parameter in parameters}
        with torch.no_grad():
            for record in self.records.values():
                if id(record.weight) in wanted:
                    record.weight.masked_fill_(~record.mask, 0)

    def _packs(self, record: MaskedWeight) -> bool:
        few = record.count < PACK_BELOW * record.weight.numel()
        return few and record.weight.device.type == "cpu" and is_elementwise(self.optimizer)

    def _look(self) -> list:
        """What says which weights are stepped, and how: as long as it is the same, so are they."""
        parameters = sum(len(group["params"]) for group in self.optimizer.param_groups)
        parts = ((r.weight, r._mask) for r in self.records.values())
        return [parameters, *((id(w), id(m), m._version, w.grad is None, w.is_cpu) for w, m in parts)]

    def _split(self) -> tuple[dict[nn.Parameter, Active | None], list[str]]:
        """The active set of each weight of the optimizer with a gradient, None where it is stepped densely, and the
        names of those that are sparse nevertheless."""
        held = held_by(self.optimizer)
        sets: dict[nn.Parameter, Active | None] = {}
        dense = []
        for name, record in self.records.items():
            if record.weight.grad is None or id(record.weight) not in held:
                continue
            packed = self._packs(record)
            sets[record.weight] = record.active if packed else None
            if not packed and record.count < record.weight.numel():
                dense.append(name)
        return sets, dense

    def _mask_gradients(self, names: Iterable[str]) -> None:
        masks = {name: self.records[name].mask for name in names}
        few = {name: self.records[name].active for name in masks if self._packs(self.records[name])}
        self.masked.mask(self.gradients(masks), masks, few)
