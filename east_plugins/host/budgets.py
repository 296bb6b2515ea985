"""How a host shares out its active weights: the masks it begins with, and every layer's budget from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.counts import apportion
from ..plugins import registry
from ..plugins.allocation.layerwise import budgets, random_mask
from ..plugins.allocation.position import places
from ..plugins.allocation.sample import Sample
from ..plugins.protocols import Structure
from .layers import block_names


class _Matrix(Protocol):
    """A weight that is masked, or chosen to be."""

    weight: nn.Parameter
    blocks: int


def blocks(weights: Mapping[str, _Matrix]) -> dict[str, Tensor]:
    """Every matrix that has a budget of its own, by its name."""
    found: dict[str, Tensor] = {}
    for name, each in weights.items():
        found.update(zip(block_names(name, each.blocks), each.weight.detach().chunk(each.blocks), strict=True))
    return found


def draw(
    allocation: Allocation,
    model: nn.Module,
    weights: Mapping[str, _Matrix],
    wanted: float,
    total: int,
    input_shape: Sequence[int] | None,
    generator: torch.Generator,
    sample: Sample | None = None,
) -> dict[str, Tensor]:
    """Boolean masks of the weights, `total` active ones over all; raises as `Allocation.draw`."""
    drawn = allocation.draw(model, blocks(weights), wanted, total, input_shape, generator, sample)
    return {name: torch.cat([drawn[key] for key in block_names(name, each.blocks)]) for name, each in weights.items()}


class Allocation:
    """A registered allocation, for one model. `share` is what gives every layer its number; for an allocation that
    draws masks that is another one. A `structure` draws the masks where it is given."""

    def __init__(self, name: str, options: Mapping[str, Any] | None = None, structure: Structure | None = None):
        entry = registry.allocation.entry(name)
        if structure is not None and entry.meta.get("draws"):
            raise UsageError(
                f"`sparse_init` {name} draws masks, and so does `structure`: allowed are ERK, ER, uniform and others "
                "that say how many weights a layer has"
            )
        self.structure = structure
        self.name, self.meta, self.rule = name, entry.meta, entry.bound(options)
        share = registry.allocation.entry(getattr(self.rule, "budgets", "ERK")) if self.meta.get("draws") else entry
        self._share = share.bound() if share is not entry else self.rule
        self._counts, self._by_place = (bool(share.meta.get(name)) for name in ("counts", "places"))
        self.drawn: dict[str, int] | None = None  #: active weights of the layers at first, where they set their shares
        self._budgets: tuple[tuple, dict[str, int]] | None = None

    def draw(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        wanted: float,
        total: int,
        input_shape: Sequence[int] | None,
        generator: torch.Generator,
        sample: Sample | None = None,
    ) -> dict[str, Tensor]:
        """Boolean masks of the weights with `total` active ones over all, which is `wanted` as a whole number, the same
        on every rank; raises `UsageError` where an input's shape or training data are needed and None."""
        if input_shape is None and (self.follows or self._by_place):
            raise UsageError(f"`sparse_init` {self.name} needs add_module(..., input_shape=(channels, height, width))")
        if self._by_place:
            assert input_shape is not None
            shapes = {name: weight.shape for name, weight in weights.items()}
            self.take(budgets(self._share, shapes, total, places(model, shapes, input_shape)))
        counts = self.budgets(weights, wanted, total, start=True)
        if not self.meta.get("draws"):
            masks = random_mask if self.structure is None else self.structure.start
            return {name: masks(weight.shape, counts[name], generator) for name, weight in weights.items()}
        data = []
        if self.meta.get("needs_data"):
            if sample is None:
                raise UsageError(
                    f"`sparse_init` {self.name} looks at the loss on training data, and there is none here: give "
                    "`batches`, such as a DataLoader, to add_module or Masking.of"
                )
            data = [sample]
        drawn = distributed.from_rank_0(self.rule(model, counts, input_shape, generator, *data))
        if self.meta.get("keeps_counts"):  # the scores, not the allocation, gave the layers their shares
            self.take({name: int(mask.sum()) for name, mask in drawn.items()})
        return drawn

    @property
    def follows(self) -> bool:
        """Whether masks are drawn along the network."""
        needs_input = self.meta.get("needs_input", True) or getattr(self.rule, "connected", False)
        return bool(self.meta.get("draws")) and needs_input

    def take(self, drawn: dict[str, int] | None) -> None:
        """Give every layer its share of these counts from here on."""
        self.drawn, self._budgets = drawn, None

    def budgets(self, weights: Mapping[str, Tensor], wanted: float, total: int, start: bool = False) -> dict[str, int]:
        """Active weights of every layer: `total` over all, but for an allocation that says itself what it makes of
        `wanted`; `start`: in the masks that training begins with."""
        key = (wanted, total, start, *weights)
        if self._budgets is None or self._budgets[0] != key:
            self._budgets = key, self._computed(weights, wanted, total, start)
        return self._budgets[1]

    def _computed(self, weights: Mapping[str, Tensor], wanted: float, total: int, start: bool) -> dict[str, int]:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if self.drawn is not None:
            sizes = [weight.numel() for weight in weights.values()]
            return dict(zip(weights, apportion([self.drawn[name] for name in weights], total, 1, sizes), strict=True))
        if self._counts:
            return {name: max(1, count) for name, count in self._share(shapes, wanted, start).items()}
        return budgets(self._share, shapes, total)
