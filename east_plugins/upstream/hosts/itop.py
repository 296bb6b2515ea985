"""ITOP's `Masking` (Shiweiliuiiiiiii/In-Time-Over-Parameterization, `sparselearning/core.py`)."""

from __future__ import annotations

from typing import Any

from ...host.masking import Masking
from ..adapter import Adapter
from .family import DrivenMasking


class ITOP(Adapter):
    """Updates inside `step`, every `prune_every_k_steps` steps; each layer keeps its count."""

    title = "ITOP"
    parameters = frozenset({"optimizer", "death_rate", "death_rate_decay", "growth_death_ratio", "args"})
    driven = DrivenMasking

    def __init__(self, host: Any):
        super().__init__(host)
        self.growth, self.pruning = host.growth_mode, host.death_mode

    @property
    def rate_decay(self) -> Any:
        return self.host.death_rate_decay

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        return Masking(**given)
