"""What a host keeps in checkpoints, copies and pickles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import UsageError
from ..plugins.protocols import HostPlugin
from . import hooks
from .books import Books
from .budgets import Allocation
from .gradients import MeanGradients
from .layers import Column
from .pace import Pace
from .stepping import Stepping
from .updating import Updates
from .watch import Stepped, attend


class Saved(Books, Pace):
    """The state of a host: its books, its pace, its random choices, and what its rules and plugins keep."""

    optimizer: torch.optim.Optimizer
    plugins: Sequence[HostPlugin]
    generator: torch.Generator
    engine: Any
    batches: Any
    _offered: Any
    _mean: MeanGradients
    _stepping: Stepping
    _built: Updates | None
    apply_mask: Callable[[], None]
    _bind_rules: Callable[[], None]

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step, random state and running averages: all that a resumed run needs."""
        self._module("state_dict")
        decay = self.death_rate_decay
        return {
            "masks": dict(self.masks),
            "fired_masks": dict(self.fired_masks),
            "momentum": dict(Column(self._records, "momentum")),
            **{kept: dict(Column(self._records, kept)) for kept in ("average", "mean_grad", "memory")},
            "averaged": self._mean.count,
            "plugins": hooks.states(self.plugins),
            "steps": self.steps,
            "put_off": self._put_off,
            "death_rate": self.prune_rate,
            "decay": decay.state_dict() if hasattr(decay, "state_dict") else None,
            "drawn": self.allocation.drawn,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in place; inactive weights are zeroed.

        Raises `UsageError` where the state's layers are not this model's.
        """
        self._module("load_state_dict")
        if missing := {"masks", "steps"} - set(state):
            raise UsageError(f"load_state_dict: this is no host's state, it has no {' and no '.join(sorted(missing))}")
        masks = state["masks"]
        if wrong := set(masks) ^ set(self.masks) or {n for n in masks if masks[n].shape != self.masks[n].shape}:
            raise UsageError(f"the saved masks do not fit the model; layers that differ: {', '.join(sorted(wrong))}")
        fired = state.get("fired_masks", {})
        for name, record in self._records.items():
            record.mask.copy_(masks[name])
            record.fired.copy_(fired.get(name, record.mask))
            for kept in ("momentum", "average", "mean_grad", "memory"):
                value = state.get(kept, {}).get(name)
                setattr(record, kept, None if value is None else value.to(record.weight.device, copy=True))
        if state.get("decay") is not None:
            self.death_rate_decay.load_state_dict(state["decay"])
        elif hasattr(self.death_rate_decay, "get_dr"):  # ITOP's own classes only count
            for _ in range(state["steps"] - self.steps):
                self.death_rate_decay.step()
        self.allocation.take(state.get("drawn"))
        self.steps, self._put_off = state["steps"], state.get("put_off", False)
        self.prune_rate = state.get("death_rate", self.prune_rate)
        self._mean.count = state.get("averaged", 0)
        hooks.restore(self.plugins, state.get("plugins", ()))
        if "generator" in state:
            self.generator.set_state(state["generator"].cpu())
        self.apply_mask()

    def __getstate__(self) -> dict[str, Any]:
        self._stepping.packed.unpack()
        left_out = ("_rules", "_stepping", "_stepped", "engine", "batches", "_offered", "_mean")
        kept = {name: value for name, value in vars(self).items() if name not in left_out}
        return kept | {"_by": self.optimizer, "_averaged": self._mean.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer, averaged = state.pop("_by"), state.pop("_averaged")
        vars(self).update(state)
        self.engine, self._stepped, self._offered, self.batches = None, Stepped(), None, None
        self._bind_rules()
        self._mean.count = averaged
        self._stepping = Stepping(optimizer, self._records)
        self._stepping.left()
        attend(self)

    @property
    def allocation(self) -> Allocation:
        """How active weights are shared out over the layers."""
        return self._updates.allocation

    @property
    def _updates(self) -> Updates:
        if self._built is None:
            raise UsageError("call add_module(model, density=...) first")
        return self._built
