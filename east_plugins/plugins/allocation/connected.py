"""Masks in which every active weight lies on a path from input to output, at given budgets.

At extreme sparsity a random mask is disconnected: hardly any weight has both an input that is reached and an output
that is read, the network computes a constant, and no gradient arrives. Here each layer's weights are confined to
random subsets of its input and output channels, by default about the square root of its budget, shared by all layers
that read or write them; every channel of the subsets gets a weight that writes it and one that reads it; and the
linearised twin (`ops.paths`) moves what still lies off path, for example taps that read nothing but padding.

Related: SynFlow (Tanaka et al. 2020), PHEW, which draws weights along random walks (Patil and Dovrolis 2021), and
effective sparsity (Vysogorets and Kempe 2023).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.channels import Wires, Wiring, trace
from ...ops.paths import on_path, path_positions
from ...ops.select import lowest_k, top_k
from ..protocols import option
from ..registry import allocation

logger = logging.getLogger(__name__)


@allocation.register("connected", draws=True, help="random masks in which every weight is on a path")
@dataclass(frozen=True)
class Connected:
    """Random masks with every layer's budget exactly, every weight on a path where the budgets allow it."""

    budgets: str = option("ERK", "allocation that gives each layer its number of weights")
    width: float = option(0.5, "channels in use, as a power of the number of weights, from 0 to 1", type=float)

    def __post_init__(self) -> None:
        if not 0 <= self.width <= 1:
            raise UsageError(f"`width` must be in [0, 1], got {self.width:g}")
        if allocation.entry(self.budgets).meta.get("draws"):
            raise UsageError(f"`budgets` {self.budgets} draws masks itself; allowed are ERK, EPL, first-blocks, ...")

    def __call__(
        self, model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        return draw(model, budgets, input_shape, generator, self.width)


def draw(
    model: nn.Module,
    budgets: Mapping[str, int],
    input_shape: Sequence[int],
    generator: torch.Generator,
    width: float = 0.5,
) -> dict[str, Tensor]:
    """Random masks with exactly `budgets[name]` active weights a layer, all on paths where the budgets allow it.

    A set of channels has as many in use as the mean of budget ** `width` over the layers that read or write it, so
    that a larger `width` gives more channels with fewer weights each. The network's inputs and outputs are all used
    where the budgets allow it. Boolean CPU tensors; the same ones on every device, given the (CPU) generator. The
    model is left as it was. Raises `UsageError` where a layer lies on no path of the dense network.
    """
    wiring, possible = structure(model, budgets, input_shape)
    scores = {name: torch.rand(positions.shape, generator=generator) for name, positions in possible.items()}
    for name, positions in possible.items():
        if not positions.any():
            raise UsageError(f"`sparse_init` connected: layer {name} lies on no path from input to output")
        if positions.sum() < budgets[name]:  # some of its weights cannot be on a path
            scores[name] += positions
            possible[name] = torch.ones_like(positions)
    ends = {*wiring.inputs.tolist(), *wiring.outputs.tolist()}

    def wanted(channels: Tensor, budgets: list[int]) -> int:
        if ends.issuperset(channels.tolist()):
            return len(channels)
        return round(sum(budget**width for budget in budgets) / len(budgets))

    def select(name: str, centred: bool) -> Tensor:
        score, kernel = scores[name].view(-1), math.prod(possible[name].shape[2:])

        def rank(at: Tensor) -> tuple[Tensor, Tensor]:
            return score[at] + (centred & (at % kernel == kernel // 2)), score[at]

        return _select(wiring.layers[name], possible[name], chosen, chosen, budgets[name], rank)

    chosen = _choose(wiring, possible, budgets, wanted, torch.rand(wiring.size, generator=generator))
    masks = {name: select(name, centred=False) for name in budgets}
    if settle(model, masks, scores, input_shape, generator):  # thin paths may be shifted out of the image
        masks = {name: select(name, centred=True) for name in budgets}
        settle(model, masks, scores, input_shape, generator)
    return masks


def reconnect(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    input_shape: Sequence[int],
    generator: torch.Generator,
) -> None:
    """Bring the masks of a topology update back onto paths, in place, every layer's count as it is.

    Active weights off path move to inactive positions on path of the same layer, the highest score first. Where
    that is not enough, because the update cut every path through a layer or left it too few positions, the layers
    concerned are selected anew among the channels that were or are in use, and as many more as they need: every
    such channel gets a weight that writes it and one that reads it, preferably one that is active or was; the rest
    are active weights and then the highest scores.

    Args:
        masks: as the update left them.
        before: as they were before it.
        scores: importance where a weight is or was active, the growth rule's score elsewhere; any scale.
        generator: CPU generator that breaks ties and chooses new channels.
    """
    kept = {name: masks[name] & before[name] for name in masks}
    stray = settle(model, masks, scores, input_shape, generator, kept)
    for every_layer in (False, True):
        if stray:
            names = list(masks) if every_layer else stray
            _select_anew(model, masks, before, scores, input_shape, generator, names)
            stray = settle(model, masks, scores, input_shape, generator)


def _select_anew(model, masks, before, scores, input_shape, generator, names) -> None:
    """Masks of the named layers, and of those that share a newly opened channel with them."""
    wiring, possible = structure(model, masks, input_shape)
    budgets = {name: int(mask.sum()) for name, mask in masks.items()}
    now, then = (_used(wiring, on_path(model, active, input_shape)) for active in (masks, before))
    used = now | then
    order = 2 * now + then + torch.rand(wiring.size, generator=generator)
    chosen = _choose(wiring, possible, budgets, lambda channels, _: int(used[channels].sum()), order)
    covered = chosen.clone()
    covered[wiring.inputs] = covered[wiring.outputs] = False
    chosen[wiring.inputs] = chosen[wiring.outputs] = True
    opened = covered & ~used

    def select(name: str) -> Tensor:
        active, was_active, score = (tensors[name].reshape(-1).cpu() for tensors in (masks, before, scores))

        def rank(at: Tensor) -> tuple[Tensor, Tensor]:
            keep, regret = active[at].int(), (was_active & ~active)[at].int()
            to_cover = _ranks(2 * keep + regret, score[at], generator)
            return to_cover, _ranks(2 * keep - regret, score[at], generator)

        return _select(wiring.layers[name], possible[name], chosen, covered, budgets[name], rank)

    for name, wires in wiring.layers.items():
        concerned = name in names or opened[wires.sources].any() or opened[wires.targets].any()
        if concerned and possible[name].sum() >= budgets[name]:
            masks[name].copy_(select(name))


def settle(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    input_shape: Sequence[int],
    generator: torch.Generator,
    kept: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Move active weights off path, lowest score first, to the inactive positions on path with the highest score,
    in place and within each layer, as far as there are any. Returns the layers that keep weights off path.

    Only positions connected by weights that stay are moved to, so that every moved weight lies on a path for good:
    first by those on path and the `kept` ones, which move last, as the others may connect them; then by those on
    path alone, anew where moved weights opened further positions.
    """
    while True:
        good = on_path(model, masks, input_shape)
        off = {name: mask & ~good[name] for name, mask in masks.items()}
        stray = [name for name in off if off[name].any()]
        if not stray:
            return stray
        stay = good if kept is None else {name: mask & (good[name] | kept[name]) for name, mask in masks.items()}
        positions, moved = path_positions(model, stay, input_shape), kept is not None
        kept = None
        for name in stray:
            mask, loose, free = masks[name], masks[name] & ~stay[name], positions[name] & ~masks[name]
            if count := min(int(loose.sum()), int(free.sum())):
                moved = True
                mask.view(-1)[lowest_k(scores[name], count, loose, generator)] = False
                mask.view(-1)[top_k(scores[name], count, free, generator)] = True
        if not moved:
            logger.info("active weights off path in %s", ", ".join(stray))
            return stray


def structure(model: nn.Module, names: Iterable[str], input_shape: Sequence[int]) -> tuple[Wiring, dict[str, Tensor]]:
    """Wiring of the layers, and their positions that lie on a path of the dense network."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: parameters[name].shape for name in names}
    dense = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    return trace(model, shapes, input_shape), path_positions(model, dense, input_shape)


def _choose(
    wiring: Wiring,
    possible: Mapping[str, Tensor],
    budgets: Mapping[str, int],
    wanted: Callable[[Tensor, list[int]], int],
    order: Tensor,
) -> Tensor:
    """Which channels to use: of every set of channels that layers read or write as a whole the first in `order`
    (highest value), `wanted(channels, budgets of these layers)` of them.

    There are never more than the smallest of the budgets, so that each can be written and read, unless a layer's
    budget would not fit then. Channel 0 is always used.
    """
    near: dict[tuple, list[int]] = {}
    sides = {}
    for name, wires in wiring.layers.items():
        sides[name] = [tuple(channels.tolist()) for channels in (wires.sources, wires.targets)]
        for side in sides[name]:
            near.setdefault(side, []).append(budgets[name])
    ranked = {side: torch.tensor(side, dtype=torch.long) for side in near}
    ranked = {side: channels[order[channels].argsort(descending=True)] for side, channels in ranked.items()}
    size = {side: max(1, min(wanted(ranked[side], near[side]), len(side), *near[side])) for side in near}
    taps = {name: _by_pair(positions).sum(2, dtype=torch.int16) for name, positions in possible.items()}
    tight = list(budgets)
    while True:
        chosen = torch.zeros(wiring.size, dtype=torch.bool)
        chosen[0] = True
        for side, channels in ranked.items():
            chosen[channels[: size[side]]] = True
        tight = [n for n in tight if taps[n][_within(wiring.layers[n], chosen, taps[n].shape)].sum() < budgets[n]]
        growing = set()
        for name in tight:
            growable = [side for side in sides[name] if size[side] < len(side)]
            growable.sort(key=lambda side: (size[side] >= min(near[side]), size[side] / len(side)))
            growing.update(growable[:1])
        if not growing:
            return chosen
        for side in growing:
            size[side] += 1 + size[side] // 8


def _within(wires: Wires, chosen: Tensor, shape: Sequence[int]) -> Tensor:
    """Which pairs of channels a layer connects within the chosen ones; `shape` is the weight's."""
    return (chosen[wires.source] & chosen[wires.target]).expand(shape[:2])


def _select(
    wires: Wires,
    possible: Tensor,
    chosen: Tensor,
    covered: Tensor,
    budget: int,
    rank: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Mask of one layer within the chosen channels: first weights that read and write the covered channels, then
    the rest. `rank(positions)` gives the order of preference for the one and for the other, the highest first."""
    allowed = _by_pair(possible) & _within(wires, chosen, possible.shape).unsqueeze(2)
    positions = allowed.flatten().nonzero().flatten()
    pair = positions // allowed.shape[2]
    i, j = pair // allowed.shape[1], pair % allowed.shape[1]
    source, target = (side.expand(allowed.shape[:2])[i, j] for side in (wires.source, wires.target))
    to_cover, to_fill = rank(positions)
    to_fill[cover(source, target, covered, to_cover)[:budget]] = torch.inf
    mask = torch.zeros(possible.shape, dtype=torch.bool)
    mask.view(-1)[positions[to_fill.topk(budget, sorted=False).indices]] = True
    return mask


def cover(source: Tensor, target: Tensor, covered: Tensor, rank: Tensor) -> Tensor:
    """A few of the positions, which read and write every covered channel (0 aside) that any of them reads or
    writes: greedily those of high rank that cover two channels at once, then one for each channel left."""
    unread, unwritten = covered.clone(), covered.clone()
    unread[0] = unwritten[0] = False
    picked = []

    def pick(at: Tensor) -> None:
        picked.append(at)
        unread[source[at]] = unwritten[target[at]] = False

    def best(channels: Tensor, at: Tensor) -> Tensor:
        """Of the positions `at` the highest in rank for each channel."""
        highest = rank.new_full(covered.shape, -torch.inf)
        highest.scatter_reduce_(0, channels[at], rank[at], "amax")
        return at[rank[at] == highest[channels[at]]]

    at = torch.arange(len(rank))
    while len(at := at[unwritten[target[at]] & unread[source[at]]]):
        pick(best(source, best(target, at)))
    pick(best(target, unwritten[target].nonzero().flatten()))
    pick(best(source, unread[source].nonzero().flatten()))
    return torch.cat(picked)


def _used(wiring: Wiring, active: Mapping[str, Tensor]) -> Tensor:
    """The channels that some weight in `active` reads or writes."""
    used = torch.zeros(wiring.size, dtype=torch.bool)
    for name, wires in wiring.layers.items():
        pairs = _by_pair(active[name].cpu()).any(2)
        for side in (wires.source, wires.target):
            used[side.expand(pairs.shape)[pairs]] = True
    return used


def _ranks(tier: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of every element by tier, then score, equal ones in random order."""
    order = torch.randperm(len(score), generator=generator)
    for key in (score.nan_to_num(nan=-torch.inf), tier):
        order = order[key[order].argsort(stable=True)]
    return torch.empty(len(score), dtype=torch.float64).scatter_(0, order, torch.arange(len(score)).double())


def _by_pair(positions: Tensor) -> Tensor:
    """A conv or linear weight's positions as [first dimension, second, kernel]."""
    return positions.reshape(*positions.shape[:2], -1)
