"""One topology update: rules score, this module counts. The active count afterwards is exact for every rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import Layer
from .ops.counts import apportion
from .ops.select import Selection, fetch, highest, lowest, positions, together


@dataclass(frozen=True)
class Rules:
    """The three rules of a host, each called with a layer and the number of weights wanted (0 where unknown).

    `grow` and `prune` return one score a weight, `redistribute` the layer's share of the growth or None for "every
    layer keeps its budget". With `scope` "global" the least important weights of all layers together are dropped.
    """

    grow: Callable[[Layer, int], Tensor]
    prune: Callable[[Layer, int], Tensor]
    redistribute: Callable[[Layer, int], Tensor] | None = None
    scope: str = "local"

    @property
    def fixed_budgets(self) -> bool:
        return self.redistribute is None and self.scope == "local"


def update(
    layers: Sequence[Layer],
    rules: Rules,
    active: Sequence[int],
    budgets: Sequence[int],
    rate: float,
    generator: torch.Generator,
) -> list[int]:
    """Prune and grow in place, from `active` weights a layer; returns each layer's active count afterwards, which
    sums to `sum(budgets)` exactly.

    Of the weights that remain at the smaller of the present and the wanted density a share `rate` is replaced;
    with a rising density more is grown, with a falling one more is dropped. Weights whose importance is `inf` are
    not replaced. Every layer keeps at least one active weight.
    """
    places = [positions(layer.mask, count) for layer, count in zip(layers, active, strict=True)]
    importance = [rules.prune(layer, 0).reshape(-1)[at] for layer, at in zip(layers, places, strict=True)]
    if rules.redistribute is not None:
        shares = [max(0.0, float(rules.redistribute(layer, 0))) for layer in layers]
    keep = _keep(rules, active, budgets, importance, rate)
    drops = [a - kept for a, kept in zip(active, keep, strict=True)]
    least = together([lowest(score, k, generator) for score, k in zip(importance, drops, strict=True)])
    for layer, place, dropped in zip(layers, places, least, strict=True):
        layer.mask.view(-1).index_fill_(0, place[dropped], False)
    if rules.fixed_budgets:
        after = list(budgets)
    else:
        if rules.redistribute is None:
            shares = [before - kept for before, kept in zip(active, keep, strict=True)]
        room = [layer.mask.numel() - kept for layer, kept in zip(layers, keep, strict=True)]
        grown = apportion(shares, sum(budgets) - sum(keep), 0, room)
        after = [kept + more for kept, more in zip(keep, grown, strict=True)]
    growing = [(layer, count - kept) for layer, kept, count in zip(layers, keep, after, strict=True) if count > kept]
    best = together([_best(rules, layer, k, generator) for layer, k in growing])
    for (layer, _), place in zip(growing, best, strict=True):
        layer.mask.view(-1).index_fill_(0, place, True)
    return after


def _best(rules: Rules, layer: Layer, k: int, generator: torch.Generator) -> Selection:
    """What grows in one layer; its scores, as large as the layer, are made when their turn comes."""
    return (yield from highest(rules.grow(layer, k), k, ~layer.mask, generator))


def _keep(rules, active, budgets, importance, rate) -> list[int]:
    """Active weights that each layer keeps, from the importance of its active ones."""
    fixed = [int(count) for count in fetch([torch.isposinf(scores).sum().view(1) for scores in importance])]
    if rules.fixed_budgets:
        bases = [min(pair) for pair in zip(active, budgets, strict=True)]
        return [min(b, max(b - int(rate * b), f)) for b, f in zip(bases, fixed, strict=True)]
    base = min(sum(active), sum(budgets))
    total = min(base, max(base - int(rate * base), sum(fixed), len(active)))
    if rules.scope == "global":
        return _keep_globally(importance, total)
    lower = [max(1, f) for f in fixed] if sum(fixed) + len(active) <= total else 1
    return apportion(active, total, lower, active)


def _keep_globally(importance, total) -> list[int]:
    """How many of the `total` most important weights over all layers lie in each; at least one a layer."""
    scores = [score.float().sort(descending=True).values for score in importance]
    for score in scores:
        score[0] = torch.inf
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores)])
    best = torch.cat(scores).cpu().argsort(descending=True, stable=True)[:total]
    return torch.bincount(owner[best], minlength=len(importance)).tolist()
