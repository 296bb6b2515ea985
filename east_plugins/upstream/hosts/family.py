"""What the hosts that descend from sparse_learning's `Masking` have in common."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ...errors import UsageError
from ...plugins import rate
from ..adapter import Driven, theirs
from ..length import decay_steps


class DrivenMasking(Driven):
    """A host with `add_module`, `step` and `truncate_weights`, that updates when `prune_every_k_steps` divides
    `steps`."""

    steps: int
    prune_every_k_steps: int | None

    def add_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(theirs(super()).add_module).bind(module, *args, **kwargs)
        given.apply_defaults()
        with self.east.making_masks(module) as factor:
            self.east_adapter.raise_density(given.arguments, factor)
            theirs(super()).add_module(*given.args, **given.kwargs)

    def step(self) -> None:
        if self.east.cycle is not None:
            self.prune_every_k_steps = self.east.frequency(self.steps + 1)
        theirs(super()).step()
        self.east.stepped()

    def truncate_weights(self, *args: Any) -> None:
        with self.east.resizing() as nonzeros:
            if nonzeros is not None:
                self.east_adapter.updating(nonzeros)
            theirs(super()).truncate_weights(*args)


def own_decay(decay: Any, initial: float) -> rate.Linear | rate.Cosine:
    """Our decay of the prune rate for one of theirs, whose `get_dr` wants an argument.

    Raises `UsageError` for a decay that does not say over how many steps it runs.
    """
    steps = decay_steps(decay)
    if steps is None:
        raise UsageError(f"--east-host own: {type(decay).__name__} does not say over how many steps it decays")
    return rate.Linear(initial, steps, final=0.0) if hasattr(decay, "decrement") else rate.Cosine(initial, steps)
