"""ITOP's `Masking` (Shiweiliuiiiiiii/In-Time-Over-Parameterization, `sparselearning/core.py`)."""

from __future__ import annotations

from typing import Any

from ...host.masking import Masking
from ..adapter import Adapter, Driven


class _Driven(Driven):
    def add_module(self, module, density, *args, **kwargs):
        self.east.adapter.asked_density = density
        with self.east.making_masks(module) as factor:
            super().add_module(module, min(1.0, factor * density), *args, **kwargs)

    def step(self):
        self.prune_every_k_steps = self.east.frequency(self.steps + 1)
        super().step()
        self.east.stepped()

    def truncate_weights(self):
        with self.east.resizing():
            super().truncate_weights()


class ITOP(Adapter):
    """Updates inside `step`, every `prune_every_k_steps` steps; each layer keeps its count."""

    title = "ITOP"
    parameters = frozenset({"optimizer", "death_rate", "death_rate_decay", "growth_death_ratio", "args"})
    driven = _Driven

    def __init__(self, host: Any):
        super().__init__(host)
        self.growth, self.pruning = host.growth_mode, host.death_mode

    @property
    def rate_decay(self) -> Any:
        return self.host.death_rate_decay

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        """Our host in place of theirs, from all arguments of its constructor."""
        return Masking(**given)
