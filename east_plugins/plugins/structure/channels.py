"""Channels that are removed one after another, while weights move over all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...ops.channels import Wires, Wiring, trace
from ...ops.select import top_k
from ..allocation.layerwise import random_mask
from ..protocols import Candidate, Moment, option
from ..registry import structure


@structure.register("channels")
@dataclass(frozen=True)
class Channels:
    """Channel-level sparsity out of dynamic sparse training (Chase, Yin et al. 2023, Section 4).

    Channels that one masked layer writes and others read can go, those of residual streams, inputs and outputs not. At
    progress p of the run the share `remove` * (1 - (1 - p / `until`)^3) of them is gone: those of the lowest UMM, the
    mean magnitude of all weights that write them, inactive ones counting as 0. Every layer keeps at least the share
    (1 - `remove`) * `least` of its own. Weights that write or read what is gone are dropped, and their number is grown
    elsewhere: pruned and grown is over all layers together, to exactly the budgets' sum as far as there is room.
    """

    remove: float = option(0.5, "share of the channels that is gone in the end", type=float)
    least: float = option(0.5, "a layer keeps this share of what it had with all layers pruned alike", type=float)
    until: float = option(0.8, "share of the run after which no more channels go", type=float)
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in (("remove", 0 <= self.remove < 1), ("least", 0 < self.least <= 1)):
            if not allowed:
                raise UsageError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.until <= 1:
            raise UsageError(f"`until` must be over 0 and at most 1, got {self.until}")

    def start(self, shape: Sequence[int], budget: int, generator: torch.Generator) -> Tensor:
        return random_mask(shape, budget, generator)

    def share(self, progress: float) -> float:
        """Share of the channels that is gone."""
        return self.remove * (1 - max(0.0, 1 - progress / self.until) ** 3)

    def update(self, layers: Sequence[Candidate], moment: Moment) -> list[Tensor]:
        assert moment.progress is not None and moment.input_shape is not None
        shapes = {each.layer.name: each.layer.weight.shape for each in layers}
        wiring = trace(moment.model, shapes, moment.input_shape)
        gone = self._gone(layers, wiring, self.share(moment.progress), moment.generator)
        allowed = [_untouched(each.layer.weight, wiring.layers[each.layer.name], gone) for each in layers]
        return _moved(layers, allowed, moment.generator)

    def _gone(self, layers: Sequence[Candidate], wiring: Wiring, share: float, generator: torch.Generator) -> Tensor:
        """Which channel numbers are removed."""
        sizes, places = torch.zeros(wiring.size), torch.zeros(wiring.size)
        for each in layers:
            weight = each.layer.weight
            size = weight.abs().reshape(*weight.shape[:2], -1).sum(2).float().cpu()
            target = wiring.layers[each.layer.name].target.expand(size.shape).flatten()
            sizes.index_add_(0, target, size.flatten())
            places.index_add_(0, target, torch.ones(len(target)))
        own = removable(wiring)
        owner = {number: name for name, numbers in own.items() for number in numbers}
        room = {name: len(ns) - max(1, int(len(ns) * (1 - self.remove) * self.least)) for name, ns in own.items()}
        numbers = torch.tensor(list(owner), dtype=torch.long)
        numbers = numbers[torch.randperm(len(numbers), generator=generator)]  # equal ones go at random
        order = numbers[(sizes / places.clamp(min=1))[numbers].argsort(stable=True)].tolist()
        left, gone = round(share * len(order)), torch.zeros(wiring.size, dtype=torch.bool)
        for number in order:
            if left and room[owner[number]]:
                gone[number] = True
                room[owner[number]], left = room[owner[number]] - 1, left - 1
        return gone


def removable(wiring: Wiring) -> dict[str, list[int]]:
    """Numbers of the channels that one layer alone writes and another one reads, by the writing layer."""
    written = torch.zeros(wiring.size, dtype=torch.long)
    read = torch.zeros(wiring.size, dtype=torch.bool)
    for wires in wiring.layers.values():
        written[wires.targets] += 1
        read[wires.sources] = True
    free = (written == 1) & read
    free[torch.cat([wiring.inputs, wiring.outputs])] = False
    return {name: wires.targets[free[wires.targets]].tolist() for name, wires in wiring.layers.items()}


def _untouched(weight: Tensor, wires: Wires, gone: Tensor) -> Tensor:
    """The places of a weight that neither write nor read a removed channel, as a mask of its shape."""
    kept = ~(gone[wires.target] | gone[wires.source])
    kept = kept.expand(weight.shape[:2]).to(weight.device)
    return kept.view(*weight.shape[:2], *[1] * (weight.dim() - 2)).expand(weight.shape)


def _moved(layers: Sequence[Candidate], allowed: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Masks after the least important weights of all layers were dropped and the highest scores grown, where allowed.
    Every layer keeps a weight; those without gradient keep theirs and get no others."""
    rate, total = max(each.rate for each in layers), sum(each.budget for each in layers)
    masks = [each.layer.mask for each in layers]
    still = [mask if each.rate < rate else torch.zeros_like(mask) for each, mask in zip(layers, masks, strict=True)]
    allowed = [
        free & mask if each.rate < rate else free for each, mask, free in zip(layers, masks, allowed, strict=True)
    ]
    parts = [mask.numel() for mask in masks]
    everywhere, active = (torch.cat([each.flatten() for each in some]) for some in (allowed, masks))
    important = torch.cat([
        _first(each.importance.masked_fill(fixed, math.inf), mask & free)
        for each, fixed, mask, free in zip(layers, still, masks, allowed, strict=True)
    ])  # fmt: skip
    leading = next(each for each in layers if each.rate == rate)
    kept = _highest(important, leading.kept(min(int(active.sum()), total)), active & everywhere, generator)
    free = everywhere & ~kept
    scores = torch.cat([
        each.growth.flatten() if alive.any() else _first(each.growth, places)
        for each, alive, places in zip(layers, kept.split(parts), free.split(parts), strict=True)
    ])  # fmt: skip
    grown = _highest(scores, total - int(kept.sum()), free, generator)
    return [part.view_as(mask) for part, mask in zip((kept | grown).split(parts), masks, strict=True)]


def _first(scores: Tensor, among: Tensor) -> Tensor:
    """The scores in one row, the highest of some places made infinite: a layer has one weight at least."""
    flat, among = scores.float().flatten().clone(), among.flatten()
    if among.any():
        flat[torch.where(among, flat, -math.inf).argmax()] = math.inf
    return flat


def _highest(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.zeros_like(eligible)
    chosen[top_k(scores, min(k, int(eligible.sum())), eligible, generator)] = True
    return chosen
