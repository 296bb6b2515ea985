"""sparse_learning's `Masking` (TimDettmers/sparse_learning, `sparselearning/core.py`) and ITOP's for ImageNet."""

from __future__ import annotations

from typing import Any

from ...host.masking import Masking
from ...plugins import rate
from ..adapter import Adapter, Driven
from ..length import decay_steps


class _Driven(Driven):
    def add_module(self, module, density, *args, **kwargs):
        self.east.adapter.asked_density = density
        with self.east.making_masks(module) as factor:
            super().add_module(module, min(1.0, factor * density), *args, **kwargs)

    def step(self):
        self.prune_every_k_steps = self.east.frequency(self.steps + 1)
        super().step()
        self.east.stepped()

    def at_end_of_epoch(self):
        if self.east.cycle is None or self.steps >= self.east.cycle.close:  # inside the cycles their schedule decides
            super().at_end_of_epoch()

    def truncate_weights(self):
        with self.east.resizing() as total:
            if total is not None:
                self.baseline_nonzero, self.adjustments, self.adjusted_growth = total, [], 0
            super().truncate_weights()


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

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        """Our host in place of theirs, from all arguments of its constructor."""
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

    def add_module(self, module, density, sparse_init="constant", **kwargs):
        names = {"constant": "uniform", "linear": "ER"}
        super().add_module(module, density, names.get(sparse_init, sparse_init), **kwargs)

    def at_end_of_epoch(self) -> None:
        self.truncate_weights()


def own_decay(decay: Any, initial: float):
    """Our decay of the prune rate for one of theirs, whose `get_dr` wants an argument."""
    kind = rate.Linear if hasattr(decay, "decrement") else rate.Cosine
    return kind(initial, decay_steps(decay), **({"final": 0.0} if kind is rate.Linear else {}))
