"""Whole diagonals of the weight as a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from ...ops.select import random_k, top_k
from ..protocols import Candidate, Moment
from ..registry import structure


@structure.register("diagonals")
@dataclass(frozen=True)
class Diagonals:
    """Whole wrapped diagonals, min(M, N) weights each, of the weight as a matrix M x N, [out, everything else] (after
    DynaDiag, Tyagi et al. 2025, Section 3).

    A budget of B weights holds B // min(M, N) of the max(M, N) diagonals. An update drops those of the lowest mean
    importance and grows those of the highest mean growth score. Raises `UsageError` for a layer whose budget holds no
    diagonal.
    """

    def start(self, shape: Sequence[int], budget: int, generator: torch.Generator) -> Tensor:
        places = diagonals(shape)
        count = _held(places, budget, f"a layer of {'x'.join(map(str, shape))} weights")
        chosen = random_k(count, torch.ones(len(places), dtype=torch.bool), generator)
        return _mask(shape, places[chosen])

    def update(self, layers: Sequence[Candidate], moment: Moment) -> list[Tensor]:
        return [self._updated(each, moment.generator) for each in layers]

    def _updated(self, each: Candidate, generator: torch.Generator) -> Tensor:
        places = diagonals(each.layer.mask.shape).to(each.layer.mask.device)
        active = each.layer.mask.reshape(-1)[places].all(1)
        count = _held(places, each.budget, f"layer {each.layer.name}")
        kept = each.kept(min(int(active.sum()), count))
        stays = top_k(_mean(each.importance, places), kept, active, generator)
        free = torch.ones_like(active).index_fill_(0, stays, False)
        grown = top_k(_mean(each.growth, places), count - kept, free, generator)
        return _mask(each.layer.mask.shape, places[torch.cat([stays, grown])])


def diagonals(shape: Sequence[int]) -> Tensor:
    """Flat indices of every wrapped diagonal of a weight as a matrix M x N; shape [max(M, N), min(M, N)].

    Diagonal d starts at row d of the first column, or at column d of the first row where there are more columns.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    offset = torch.arange(max(rows, columns))[:, None]
    along = torch.arange(min(rows, columns))[None]
    moved = (along + offset) % max(rows, columns)
    return moved * columns + along if rows >= columns else along * columns + moved


def _held(places: Tensor, budget: int, what: str) -> int:
    """Diagonals that a budget of weights holds."""
    if budget < places.shape[1]:
        raise UsageError(
            f"`structure` diagonals: {what} has {budget} active weights, and a diagonal {places.shape[1]}; allowed is "
            "a `density` or an allocation that gives it as many, or to leave the layer dense"
        )
    return min(budget // places.shape[1], len(places))


def _mean(scores: Tensor, places: Tensor) -> Tensor:
    return scores.reshape(-1)[places].float().mean(1)


def _mask(shape: Sequence[int], places: Tensor) -> Tensor:
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=places.device)
    mask.view(-1)[places.flatten()] = True
    return mask
