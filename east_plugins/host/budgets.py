"""How a host shares out its active weights: the masks it begins with, and every layer's budget from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.counts import apportion
from ..plugins import registry
from ..plugins.allocation.layerwise import budgets, random_mask
from ..plugins.allocation.position import places


class Allocation:
    """A registered allocation, for one model.

    `options` are keyword arguments of an allocation that draws; `budgets` among them names the allocation that gives
    each layer its number, by default the one that it was registered with. Raises `UsageError` for options that the
    allocation does not have.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None):
        self.name, self.options = name, dict(options or {})
        self.meta = registry.allocation.entry(name).meta
        base = self.options.pop("budgets", None)
        if options and not (self.meta.get("draws") and "budgets" in self.meta):
            raise UsageError(f"--sparse-init {name} has no options; connected has --connected-budgets and -width")
        self._base = base or (self.meta.get("budgets", "ERK") if self.meta.get("draws") else name)
        self._by_place = bool(registry.allocation.entry(self._base).meta.get("places"))
        if base and registry.allocation.entry(base).meta.get("draws"):
            raise UsageError(
                f"--connected-budgets {base} draws masks of its own; allowed are ERK, EPL, first-blocks, ..."
            )
        self.drawn: dict[str, int] | None = None  #: active weights that scores or positions gave the layers at first
        self._budgets: tuple[tuple, dict[str, int]] | None = None

    def draw(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        total: int,
        input_shape: Sequence[int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Boolean masks of the weights with `total` active ones over all; raises `UsageError` where an input's shape
        is needed and None."""
        if self._by_place and input_shape is None:
            raise UsageError(f"--sparse-init {self.name} needs add_module(..., input_shape=(channels, height, width))")
        if self._by_place:
            shapes = {name: weight.shape for name, weight in weights.items()}
            self.take(budgets(self._base, shapes, total, places(model, shapes, input_shape)))
        counts = self.budgets(weights, total)
        if not self.meta.get("draws"):
            return {name: random_mask(weight.shape, counts[name], generator) for name, weight in weights.items()}
        if input_shape is None:
            raise UsageError(f"--sparse-init {self.name} needs add_module(..., input_shape=(channels, height, width))")
        masks = registry.allocation.get(self.name)(model, counts, input_shape, generator, **self.options)
        if self.meta.get("keeps_counts"):  # the scores, not the allocation, gave the layers their shares
            self.take({name: int(mask.sum()) for name, mask in masks.items()})
        return masks

    def take(self, drawn: dict[str, int] | None) -> None:
        """Give every layer its share of these counts from here on."""
        self.drawn, self._budgets = drawn, None

    def budgets(self, weights: Mapping[str, Tensor], total: int) -> dict[str, int]:
        """Active weights of every layer, `total` over all."""
        if self._budgets is None or self._budgets[0] != (total, *weights):
            self._budgets = (total, *weights), self._computed(weights, total)
        return self._budgets[1]

    def _computed(self, weights: Mapping[str, Tensor], total: int) -> dict[str, int]:
        if self.drawn is not None:
            sizes = [weight.numel() for weight in weights.values()]
            return dict(zip(weights, apportion([self.drawn[name] for name in weights], total, 1, sizes), strict=True))
        return budgets(self._base, {name: weight.shape for name, weight in weights.items()}, total)
