"""One topology update: rules score, this module counts. The active count afterwards is exact for every rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.counts import apportion
from ..ops.select import Selection, fetch, highest, lowest, together, upload
from ..plugins.protocols import Layer

#: What is pruned over all layers together: nothing, what a falling density drops, or that and what is replaced.
SCOPES = ("local", "global", "all")


@dataclass(frozen=True)
class Rules:
    """The three rules of a host, each called with a layer and the number of weights wanted (0 where unknown).

    `grow` and `prune` return one score a weight, `redistribute` the layer's share of the growth or None for "every
    layer keeps its budget". With `scope` "global" a falling density drops the least important weights of all layers
    together; what is replaced is each layer's own share (GraNet, Liu et al. 2021, Algorithm 1). With "all" that
    is found over all layers too, and every layer grows back what it lost (Nowak et al. 2023, Appendix I). `whole` makes
    a whole number of the share that is replaced: `int`, or `math.ceil` as in ITOP. `over_layers` scores several layers,
    where a prune rule's importances can be compared in one layer only; `pointwise`: those of single weights do not
    depend on others.
    """

    grow: Callable[[Layer, int], Tensor]
    prune: Callable[[Layer, int], Tensor]
    redistribute: Callable[[Layer, int], Tensor] | None = None
    scope: str = "local"
    whole: Callable[[float], int] = int
    over_layers: Callable[[Sequence[Layer]], Sequence[Tensor]] | None = None
    pointwise: bool = False

    def importances(self, changes: Sequence[Change]) -> list[Tensor]:
        """One score for each of the active weights of every layer."""
        if self.over_layers is not None and self.scope != "local":
            found = self.over_layers([change.layer for change in changes])
        elif self.pointwise:
            return [self.prune(change.layer.at(change.places), 0) for change in changes]
        else:
            found = [self.prune(change.layer, 0) for change in changes]
        return [each.reshape(-1)[change.places] for each, change in zip(found, changes, strict=True)]


@dataclass
class Change:
    """What one layer goes through in an update.

    Attributes:
        layer: as the rules see it; its mask is written to.
        places: flat indices of the weights that are active at first.
        budget: active weights that it shall have, where nothing is redistributed.
        rate: share of its weights that is replaced.
        importance: of the weights at `places`, on the CPU.
        base: active weights that remain at the smaller of the present and the wanted density.
        kept: active weights that are not dropped.
        count: active weights afterwards.
    """

    layer: Layer
    places: Tensor
    budget: int
    rate: float
    importance: Tensor = field(default_factory=lambda: torch.empty(0))
    base: int = 0
    kept: int = 0
    count: int = 0

    @property
    def active(self) -> int:
        return len(self.places)

    @property
    def size(self) -> int:
        return self.layer.mask.numel()

    @functools.cached_property
    def fixed(self) -> int:
        """Active weights that are not to be replaced."""
        return int(torch.isposinf(self.importance).sum())


def update(changes: Sequence[Change], rules: Rules, generator: torch.Generator) -> None:
    """Prune and grow in place; each layer's active count afterwards is its `count`, and all counts sum to the sum of
    the budgets exactly.

    Of the weights that remain at the smaller of the present and the wanted density the layer's `rate` is replaced;
    with a rising density more is grown, with a falling one more is dropped. Weights whose importance is `inf` are
    not replaced. Every layer keeps at least one active weight.
    """
    drop(changes, rules, generator)
    growing = [change for change in changes if change.count > change.kept]
    best = together([_best(rules, change.layer, change.count - change.kept, generator) for change in growing])
    for change, place in zip(growing, best, strict=True):
        change.layer.mask.view(-1).index_fill_(0, place, True)


def drop(changes: Sequence[Change], rules: Rules, generator: torch.Generator) -> None:
    """The first half of an update: prune in place, and find how many weights each layer is to have."""
    device = changes[0].layer.mask.device
    for change, importance in zip(changes, fetch(rules.importances(changes), None), strict=True):
        change.importance = importance  # of few weights: the host selects faster than it can ask a device to
    _count(changes, rules)
    least = together([lowest(change.importance, change.active - change.kept, generator) for change in changes])
    for change, dropped in zip(changes, upload(least, device), strict=True):
        change.layer.mask.view(-1).index_fill_(0, change.places[dropped.to(change.places.device)], False)


def _best(rules: Rules, layer: Layer, k: int, generator: torch.Generator) -> Selection:
    """What grows in one layer; its scores, as large as the layer, are made when their turn comes."""
    return (yield from highest(rules.grow(layer, k), k, ~layer.mask, generator))


def _shares(rules: Rules, changes: Sequence[Change]) -> list[float] | None:
    """Each layer's share of the growth; None where every layer keeps its budget."""
    if rules.redistribute is None:
        return None
    found = [torch.as_tensor(rules.redistribute(change.layer, 0)).detach().view(1) for change in changes]
    return [max(0.0, float(share)) for share in fetch(found, torch.float64)]


def _count(changes: Sequence[Change], rules: Rules) -> None:
    """Find how many weights each layer keeps, and how many it has afterwards."""
    shares = _shares(rules, changes)
    total = sum(change.budget for change in changes)
    base = min(sum(change.active for change in changes), total)
    if shares is not None and rules.scope == "local":
        _drop_over_all(changes, base, rules.whole)
        return _grow(changes, shares, total)
    if rules.scope == "local":
        for change in changes:
            change.base = min(change.active, change.budget)
    else:
        for change, most in zip(changes, _most_important(changes, base), strict=True):
            change.base = most
    for change in changes:
        change.kept = change.base - rules.whole(change.rate * change.base)
        change.count = change.budget
    if rules.scope == "all" and (moving := [change for change in changes if change.rate]):
        left = sum(change.base for change in moving)
        left -= rules.whole(max(change.rate for change in moving) * left)
        for change, most in zip(moving, _most_important(moving, max(left, len(moving))), strict=True):
            change.kept = most
    for change in changes:
        change.kept = min(change.base, max(change.kept, change.fixed))
    if shares is not None:
        _grow(changes, shares, total)
    elif rules.scope != "local":
        bases = [change.base for change in changes]
        for change, more in zip(changes, _room_filled(bases, bases, total, changes), strict=True):
            change.count = change.base + more


def _drop_over_all(changes: Sequence[Change], base: int, whole: Callable[[float], int]) -> None:
    """A share of the base is dropped over all layers, in proportion to their active weights."""
    active = [change.active for change in changes]
    fixed = [change.fixed if change.rate else change.active for change in changes]
    rate = max(change.rate for change in changes)
    kept = min(base, max(base - whole(rate * base), sum(fixed), len(changes)))
    lower: int | list[int] = [max(1, f) for f in fixed] if sum(fixed) + len(changes) <= kept else 1
    for change, keep in zip(changes, apportion(active, kept, lower, active), strict=True):
        change.kept = keep


def _grow(changes: Sequence[Change], shares: Sequence[float], total: int) -> None:
    """All layers grow to `total` together, by shares of the growth."""
    kept = [change.kept for change in changes]
    for change, more in zip(changes, _room_filled(shares, kept, total, changes), strict=True):
        change.count = change.kept + more


def _room_filled(
    shares: Sequence[float], counts: Sequence[int], total: int, changes: Sequence[Change]
) -> Sequence[int]:
    """How many weights are added to the counts so that they sum to `total`, by shares and as there is room."""
    room = [change.size - count for change, count in zip(changes, counts, strict=True)]
    return apportion(shares, total - sum(counts), 0, room)


def _most_important(changes: Sequence[Change], total: int) -> list[int]:
    """How many of the `total` most important weights over all layers lie in each of them; at least one."""
    scores = [change.importance.double().sort(descending=True).values for change in changes]
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores)])
    ranked = torch.cat([torch.cat([torch.full_like(score[:1], torch.inf), score[1:]]) for score in scores])
    best = ranked.argsort(descending=True, stable=True)[:total]
    return torch.bincount(owner[best], minlength=len(changes)).tolist()
