"""The books of a host: which weights of one model are masked and how many of them are active, under ITOP's names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping

from torch import Tensor, nn

from ..errors import UsageError
from ..ops.active import Active
from ..ops.maskable import unwrap
from ..ops.select import fetch
from .layers import Column, MaskedWeight

logger = logging.getLogger(__name__)


class Books:
    """The masked weights of one model.

    Attributes:
        modules: the model, as `add_module` got it; empty before.
    """

    def __init__(self):
        self.modules: list[nn.Module] = []
        self._records: dict[str, MaskedWeight] = {}
        self._frozen: dict[str, nn.Parameter] = {}

    @property
    def theoretical_size(self) -> int:
        """Number of masked weights of the unshared network."""
        return sum(record.uses * record.weight.numel() for record in self._records.values())

    @property
    def masks(self) -> MutableMapping[str, Tensor]:
        """The masks by the weights' names; `pop` is `remove_weight`."""
        return Column(self._records, "mask", remove=self.remove_weight)

    @property
    def fired_masks(self) -> MutableMapping[str, Tensor]:
        """Which weights were active at least once so far."""
        return Column(self._records, "fired", remove=self.remove_weight)

    @property
    def weights(self) -> MutableMapping[str, nn.Parameter]:
        """The parameters that are masked."""
        return Column(self._records, "weight", remove=self.remove_weight)

    @property
    def name2nonzeros(self) -> MutableMapping[str, int]:
        """Number of active weights."""
        return Column(self._records, "count", remove=self.remove_weight)

    @property
    def num_remove(self) -> MutableMapping[str, int]:
        """Number of weights that the last topology update dropped."""
        return Column(self._records, "dropped")

    @property
    def name2zeros(self) -> dict[str, int]:
        return {name: record.mask.numel() - record.count for name, record in self._records.items()}

    @property
    def names(self) -> list[str]:
        return list(self._records)

    @property
    def nonzeros(self) -> int:
        """Number of active weights, from the host's own books: no device synchronisation."""
        return sum(record.count for record in self._records.values())

    def active(self, name: str) -> Active:
        """Positions of a layer's active weights."""
        return self._records[name].active

    def remove_weight(self, name: str) -> None:
        """Stop masking the weight called `name` or `name.weight`; it trains densely from here on.

        Raises `UsageError` for an unknown one.
        """
        del self._records[self._full(name)]

    def remove_weight_partial_name(self, partial_name: str) -> None:
        """Stop masking every weight whose name contains `partial_name`."""
        for name in [name for name in self._records if partial_name in name]:
            self.remove_weight(name)

    def remove_param_names(self, names: Iterable[str]) -> None:
        """Stop masking the weights of these names."""
        for name in names:
            self.remove_weight(name)

    def remove_type(self, nn_type: type[nn.Module]) -> None:
        """Stop masking the weights of every module of class `nn_type`."""
        for module in unwrap(self._module("remove_type")).modules():
            if isinstance(module, nn_type):
                own = {id(parameter) for parameter in module.parameters(recurse=False)}
                for name in [name for name, record in self._records.items() if id(record.weight) in own]:
                    self.remove_weight(name)

    def fired_masks_update(self) -> tuple[dict[str, float], float]:
        """Share of weights active at least once so far: per layer, and of all maskable ones of the unshared network, as
        the density counts them (the ITOP rate)."""
        for record in self._records.values():
            mask = record.mask  # first: brings both to the weight's device
            record.fired |= mask
        counts = fetch([record.fired.sum().view(1) for record in self._records.values()])
        fired = {name: int(count) for name, count in zip(self._records, counts, strict=True)}
        shares = {name: count / self._records[name].mask.numel() for name, count in fired.items()}
        return shares, sum(fired.values()) / self.theoretical_size

    def print_nonzero_counts(self) -> None:
        """Log every layer's active weights (level INFO of this module's logger)."""
        for name, record in self._records.items():
            logger.info("%s: %d active, density %.6f", name, record.count, record.count / record.mask.numel())

    def _tell_unfrozen(self) -> None:
        """Say once which weights that were frozen when masks were made are trained by now."""
        if trained := [name for name, weight in self._frozen.items() if weight.requires_grad]:
            logger.warning("weights that were frozen when masks were made are trained now, and stay dense: %s", trained)
            self._frozen = {}

    def _full(self, name: str) -> str:
        full = name if name in self._records else f"{name}.weight"
        if full not in self._records:
            raise UsageError(f"remove_weight: {full!r} is not masked; known: {', '.join(self._records)}")
        return full

    def _module(self, wanted: str) -> nn.Module:
        if not self.modules:
            raise UsageError(f"{wanted}: call add_module(model, density=...) first")
        return self.modules[0]

    def _name_of(self, weight: Tensor) -> str:
        return next(name for name, record in self._records.items() if record.weight is weight)
