"""One topology update: rules score, this module counts. The active count afterwards is exact for every rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.counts import apportion
from ..ops.select import Selection, fetch, highest, lowest, together, upload
from ..plugins.protocols import Layer


@dataclass(frozen=True)
class Rules:
    """The three rules of a host, each called with a layer and the number of weights wanted (0 where unknown).

    `grow` and `prune` return one score a weight, `redistribute` the layer's share of the growth or None for "every
    layer keeps its budget". With `scope` "global" a falling density drops the least important weights of all layers
    together; what is replaced is each layer's own share (GraNet, Liu et al. 2021, Algorithm 1).
    """

    grow: Callable[[Layer, int], Tensor]
    prune: Callable[[Layer, int], Tensor]
    redistribute: Callable[[Layer, int], Tensor] | None = None
    scope: str = "local"


def update(
    layers: Sequence[Layer],
    rules: Rules,
    places: Sequence[Tensor],
    budgets: Sequence[int],
    rate: float,
    generator: torch.Generator,
) -> list[int]:
    """Prune and grow in place, from the active weights at `places` (flat indices) of each layer; returns each layer's
    active count afterwards, which sums to `sum(budgets)` exactly.

    Of the weights that remain at the smaller of the present and the wanted density a share `rate` is replaced;
    with a rising density more is grown, with a falling one more is dropped. Weights whose importance is `inf` are
    not replaced. Every layer keeps at least one active weight.
    """
    device = layers[0].mask.device
    scores = [rules.prune(layer, 0).reshape(-1)[at] for layer, at in zip(layers, places, strict=True)]
    importance = fetch(scores, None)  # of few weights: the host selects faster than it can ask a device to
    shares = _shares(rules, layers)
    keep, after = _counts(importance, budgets, rate, rules.scope, shares, [layer.mask.numel() for layer in layers])
    drops = [len(at) - kept for at, kept in zip(places, keep, strict=True)]
    least = together([lowest(score, k, generator) for score, k in zip(importance, drops, strict=True)])
    for layer, place, dropped in zip(layers, places, upload(least, device), strict=True):
        layer.mask.view(-1).index_fill_(0, place[dropped.to(place.device)], False)
    growing = [(layer, count - kept) for layer, kept, count in zip(layers, keep, after, strict=True) if count > kept]
    best = together([_best(rules, layer, k, generator) for layer, k in growing])
    for (layer, _), place in zip(growing, best, strict=True):
        layer.mask.view(-1).index_fill_(0, place, True)
    return after


def _best(rules: Rules, layer: Layer, k: int, generator: torch.Generator) -> Selection:
    """What grows in one layer; its scores, as large as the layer, are made when their turn comes."""
    return (yield from highest(rules.grow(layer, k), k, ~layer.mask, generator))


def _shares(rules: Rules, layers: Sequence[Layer]) -> list[float] | None:
    """Each layer's share of the growth; None where every layer keeps its budget."""
    if rules.redistribute is None:
        return None
    found = [torch.as_tensor(rules.redistribute(layer, 0)).detach().view(1) for layer in layers]
    return [max(0.0, float(share)) for share in fetch(found, torch.float64)]


def _counts(importance, budgets, rate, scope, shares, sizes) -> tuple[list[int], list[int]]:
    """Active weights that each layer keeps, from the importance of its active ones, and those it has afterwards."""
    active, fixed = [len(scores) for scores in importance], [int(torch.isposinf(s).sum()) for s in importance]
    base, total = min(sum(active), sum(budgets)), sum(budgets)
    if scope == "global":
        bases = _most_important(importance, base)
    elif shares is None:
        bases = [min(pair) for pair in zip(active, budgets, strict=True)]
    else:
        kept = min(base, max(base - int(rate * base), sum(fixed), len(active)))
        lower = [max(1, f) for f in fixed] if sum(fixed) + len(active) <= kept else 1
        keep = apportion(active, kept, lower, active)
        return keep, _grown(keep, shares, total, sizes)
    keep = [min(b, max(b - int(rate * b), f)) for b, f in zip(bases, fixed, strict=True)]
    if shares is not None:
        return keep, _grown(keep, shares, total, sizes)
    return keep, _grown(bases, bases, total, sizes) if scope == "global" else list(budgets)


def _grown(counts, shares, total, sizes) -> list[int]:
    """Counts of all layers once they have grown to `total` together, by shares of the growth."""
    room = [size - count for size, count in zip(sizes, counts, strict=True)]
    grown = apportion(shares, total - sum(counts), 0, room)
    return [count + more for count, more in zip(counts, grown, strict=True)]


def _most_important(importance, total) -> list[int]:
    """How many of the `total` most important weights over all layers lie in each; at least one a layer."""
    scores = [score.double().sort(descending=True).values for score in importance]
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores)])
    scores = torch.cat([torch.cat([torch.full_like(score[:1], torch.inf), score[1:]]) for score in scores])
    best = scores.argsort(descending=True, stable=True)[:total]
    return torch.bincount(owner[best], minlength=len(importance)).tolist()
