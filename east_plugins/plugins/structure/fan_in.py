"""The same number of active weights for every neuron that has any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from ...ops.select import random_k, top_k, top_k_of_rows
from ..protocols import Candidate, Moment, option
from ..registry import structure


@structure.register("fan-in")
@dataclass(frozen=True)
class ConstantFanIn:
    """Constant fan-in with neuron ablation (SRigL, Lasby et al. 2024, Section 3.1).

    A neuron is a row of the weight, [out, everything else]. A layer with a budget of B weights and n active neurons
    has k = B // n active weights in each of them, k * n in all; where B < n it has B neurons of one weight. A neuron
    is ablated where an update finds fewer than `gamma_sal` * k salient weights in it, and comes back where it finds
    more. Salient are the weights that stay of those pruned over the layer, and as many inactive ones as are grown,
    with the highest scores. With a `gamma_sal` of 0 none is ablated. Neurons of the last layer are the network's
    outputs and are all kept.
    """

    gamma_sal: float = option(
        0.3, "a neuron with fewer salient weights than this share of the fan-in is ablated", type=float
    )

    def __post_init__(self) -> None:
        if not 0 <= self.gamma_sal <= 1:
            raise UsageError(f"`gamma_sal` must be in [0, 1], got {self.gamma_sal}")

    def start(self, shape: Sequence[int], budget: int, generator: torch.Generator) -> Tensor:
        rows, columns = shape[0], math.prod(shape[1:])
        everywhere = torch.ones(rows, columns, dtype=torch.bool)
        fan_in = torch.full((rows,), fan_in_of(budget, rows, columns))
        if budget < rows:
            fan_in.zero_()[random_k(budget, everywhere[:, 0], generator)] = 1
        scores = torch.rand(rows, columns, generator=generator)
        return top_k_of_rows(scores, fan_in, everywhere, generator).view(tuple(shape))

    def update(self, layers: Sequence[Candidate], moment: Moment) -> list[Tensor]:
        """Steps 1 to 7 of Section 3.1 for every layer."""
        return [self._updated(each, each is layers[-1], moment.generator) for each in layers]

    def _updated(self, each: Candidate, last: bool, generator: torch.Generator) -> Tensor:
        mask = each.layer.mask.flatten(1)
        importance, growth = each.importance.reshape(mask.shape), each.growth.reshape(mask.shape)
        rows, active = int(mask.any(1).sum()), int(mask.sum())
        fan_in = fan_in_of(each.budget, rows, mask.shape[1])
        wanted = fan_in * min(rows, each.budget)
        keep = each.kept(min(active, wanted))
        kept = _chosen(importance, keep, mask, generator)
        salient = kept | _chosen(growth, wanted - keep, ~mask, generator)
        alive = self._alive(salient.sum(1), fan_in, each.budget, mask.shape[1], last, generator)
        rows = int(alive.sum())
        ceiling = torch.where(alive, fan_in_of(each.budget, rows, mask.shape[1]), 0)
        kept = top_k_of_rows(importance, ceiling, kept & alive[:, None], generator)
        return kept | top_k_of_rows(growth, ceiling - kept.sum(1), ~kept, generator)

    def _alive(
        self, salient: Tensor, fan_in: int, budget: int, columns: int, last: bool, generator: torch.Generator
    ) -> Tensor:
        """Which neurons are not ablated: no fewer than can take the budget, and no more than it has weights."""
        alive = torch.ones_like(salient, dtype=torch.bool)
        if self.gamma_sal and not last:
            alive = salient >= max(1.0, self.gamma_sal * fan_in)
        count = min(max(int(alive.sum()), -(-budget // columns)), budget, len(salient))
        return alive if count == alive.sum() else _chosen(salient, count, torch.ones_like(alive), generator)


def fan_in_of(budget: int, rows: int, columns: int) -> int:
    """Active weights of each of `rows` active neurons, at least one and at most `columns`."""
    return min(columns, max(1, budget // max(1, rows)))


def _chosen(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """The `k` highest of the eligible scores as a mask, all where there are fewer."""
    chosen = torch.zeros_like(eligible)
    chosen.view(-1)[top_k(scores.float(), min(k, int(eligible.sum())), eligible, generator)] = True
    return chosen
