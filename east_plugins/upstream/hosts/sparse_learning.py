"""sparse_learning's `Masking` (TimDettmers/sparse_learning, `sparselearning/core.py`) and ITOP's for ImageNet."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...host.masking import Masking
from ..adapter import Adapter, theirs
from .family import DrivenMasking, own_decay


class _Driven(DrivenMasking):
    def at_end_of_epoch(self) -> None:
        if self.east.cycle is None or self.steps >= self.east.cycle.close:  # inside the cycles their schedule decides
            theirs(super()).at_end_of_epoch()


class SparseLearning(Adapter):
    """Updates when the script says so, at the end of each epoch but the last; moves weights between layers and
    steers their number towards `baseline_nonzero`."""

    title = "sparse_learning"
    parameters = frozenset({"optimizer", "prune_rate_decay", "prune_rate", "prune_mode", "verbose", "fp16"})
    driven = _Driven
    redistributes = True

    def __init__(self, host: Any):
        super().__init__(host)
        self.growth, self.pruning = host.growth_mode, host.prune_mode

    @property
    def density(self) -> float:
        if self.asked_density is not None:
            return self.asked_density
        return self.host.baseline_nonzero / sum(mask.numel() for mask in self.host.masks.values())

    def updating(self, nonzeros: int) -> None:
        self.host.baseline_nonzero, self.host.adjustments, self.host.adjusted_growth = nonzeros, [], 0

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        return _OwnHost(
            given["optimizer"],
            death_rate=given["prune_rate"],
            death_rate_decay=own_decay(given["prune_rate_decay"], given["prune_rate"]),
            death_mode=given["prune_mode"],
            growth_mode=given["growth_mode"],
            redistribution_mode=given["redistribution_mode"],
            update_frequency=given.get("prune_every_k_steps") or None,
        )


class _OwnHost(Masking):
    """Our host with sparse_learning's way of updating."""

    def add_module(
        self, module: nn.Module, density: float = 0.05, sparse_init: str = "constant", **kwargs: Any
    ) -> None:
        names = {"constant": "uniform", "linear": "ER"}
        super().add_module(module, density, names.get(sparse_init, sparse_init), **kwargs)

    def at_end_of_epoch(self) -> None:
        self.truncate_weights()
