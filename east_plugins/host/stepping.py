"""An optimizer step that moves active weights only: packed where few are active, else with masked gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.active import Active
from .gradients import MaskedGradients
from .layers import MaskedWeight
from .packed import PackedState

#: Layers of a smaller active share are stepped packed on the CPU; all others dense with masked gradients, which on an
#: accelerator costs fewer operations and keeps a CUDA graph of a step valid when the topology changes.
PACK_BELOW = 0.1


class Stepping:
    """Steps of one optimizer over the weights of a host.

    Every supported optimizer leaves a weight at zero that has zero gradient and zero state, so that it is enough to
    mask the gradients.

    Attributes:
        packed: the optimizer's state of the weights that are stepped packed.
        masked: which gradients were masked.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, records: Mapping[str, MaskedWeight]):
        self.records = records
        self.packed = PackedState(optimizer)
        self.masked = MaskedGradients()
        self._dense: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def prepared(self, keep_dense: bool, engine: Any) -> Iterator[None]:
        """Inside, the optimizer's step moves active weights only. `keep_dense` keeps the gradients as they were before
        they are masked, for `dense_gradients`; `engine` is the sparse engine, where one is attached."""
        sets, dense = self._split(engine)
        self._dense = {name: grad.clone() for name, grad in self.gradients(dense).items()} if keep_dense else {}
        self._mask_gradients(dense)
        with self.packed.stepping(sets):
            yield

    @contextlib.contextmanager
    def dense_gradients(self) -> Iterator[None]:
        """Inside, gradients are dense again that the last step masked."""
        for name, grad in self._dense.items():
            self.records[name].weight.grad = grad
        yield
        self._mask_gradients(self._dense)
        self._dense = {}

    def with_closure(
        self, step: Callable, closure: Callable, prepared: Callable[[], contextlib.AbstractContextManager]
    ) -> Any:
        """An optimizer's `step(closure)`, prepared once the closure has made the gradients."""
        with contextlib.ExitStack() as stack:

            def then_prepared() -> Any:
                loss = closure()
                stack.enter_context(prepared())
                return loss

            return step(then_prepared)

    def gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gradients by name, of the weights that have one."""
        grads = {name: self.records[name].weight.grad for name in (self.records if names is None else names)}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def follow(self, record: MaskedWeight) -> None:
        """Bring the packed state of a weight to its active set."""
        self.packed.move(record.weight, record.active)

    def masked_already(self, name: str) -> bool:
        """Whether the gradient of a weight, as it is, was masked by a step."""
        return self.masked.has_masked(name, self.records[name].weight.grad)

    def _split(self, engine: Any) -> tuple[dict[nn.Parameter, Active | None], list[str]]:
        """The active set of each weight with a gradient, None where it is stepped densely, and the names of those
        whose gradients are to be masked for that."""
        sets: dict[nn.Parameter, Active | None] = {}
        masked = []
        for name, record in self.records.items():
            weight = record.weight
            if weight.grad is None:
                continue
            count, size = record.count, weight.numel()
            packed = count < PACK_BELOW * size and weight.device.type == "cpu"
            sets[weight] = record.active if packed else None
            if not packed and count < size and not (engine and engine.masks_gradient(name)):
                masked.append(name)
        return sets, masked

    def _mask_gradients(self, names: Iterable[str]) -> None:
        masks = {name: self.records[name].mask for name in names}
        self.masked.mask(self.gradients(masks), masks)
