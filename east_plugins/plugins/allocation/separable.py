"""Masks like depthwise-separable convolutions: whole kernels of single channels, then pairs without kernels.

A convolution that sees k x k positions of one channel for each output costs k * k weights a channel, one that mixes
channels at one position costs a weight a pair (MobileNet, Howard et al. 2017). Layers take turns at both along the
path, as wide as the number of weights allows, the same width everywhere; residual blocks, which the identity bypasses,
keep one weight a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.channels import Wires, Wiring
from ...ops.paths import path_positions
from ...ops.select import top_k
from ..registry import allocation
from .connected import cover, settle, structure
from .connected import draw as draw_connected
from .layerwise import budgets as split
from .position import placed

FULL, KERNELS, PAIRS, SPARE = "full", "kernels", "pairs", "spare"


@dataclass(frozen=True)
class _Layer:
    """What a mask is drawn from: the wiring, the role, the positions on a path of the dense network as [first
    dimension, second, taps], and how many of these taps each pair [first, second] gets if it gets any."""

    wires: Wires
    role: str
    possible: Tensor
    taps: Tensor

    @classmethod
    def of(cls, wires: Wires, role: str, possible: Tensor) -> _Layer:
        possible = possible.reshape(*possible.shape[:2], -1)
        taps = possible.any(2).int() if role in (PAIRS, SPARE) else possible.sum(2, dtype=torch.int32)
        return cls(wires, role, possible, taps)


@allocation.register("separable", draws=True, keeps_counts=True, help="whole kernels and pairs of channels in turn")
def separable(
    model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks of `sum(budgets.values())` weights: whole kernels and pairs of channels in turn, as wide as they can be.

    The first layers have every weight between their channels. Then a layer with kernels follows each input channel by
    one of its own, with all taps, unless the layer before did; any other layer connects all pairs of its channels at
    its kernel's centre. A layer in a residual block that begins and ends in one stream, or beside a block that opens a
    stream, keeps one weight. What is left of the total lies at random between the channels in use.

    `budgets` gives the total only; where it is too small for one channel a layer, the masks are those of `connected`
    with the same number in every layer. Boolean CPU tensors; the model is left as it was. Raises `UsageError` where a
    layer lies on no path of the dense network.
    """
    wiring, possible = structure(model, budgets, input_shape)
    shapes, total = {name: positions.shape for name, positions in possible.items()}, sum(budgets.values())
    if lost := [name for name, positions in possible.items() if not positions.any()]:
        raise UsageError(f"`sparse_init` separable: layer {lost[0]} lies on no path from input to output")
    roles = _roles(wiring, shapes)
    layers = {name: _Layer.of(wiring.layers[name], roles[name], positions) for name, positions in possible.items()}
    pairs = _widest(layers, wiring, total, torch.rand(wiring.size, generator=generator))
    if pairs is None:
        return draw_connected(model, split("EPL", shapes, total), input_shape, generator)
    masks = {name: _mask(layer, pairs[name]).view(shapes[name]) for name, layer in layers.items()}
    inside = {name: _between(mask, layers[name]) for name, mask in masks.items()}
    reached, anywhere = path_positions(model, masks, input_shape), {n: torch.ones_like(m) for n, m in masks.items()}
    missing = total - sum(int(mask.sum()) for mask in masks.values())
    _fill(masks, missing, (inside, reached, possible, anywhere), generator)
    scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks.items()}
    if settle(model, masks, scores, input_shape, generator):
        return draw_connected(model, {n: int(mask.sum()) for n, mask in masks.items()}, input_shape, generator)
    return masks


def _roles(wiring: Wiring, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    where = placed(wiring, shapes)
    roles: dict[str, str] = {}
    for name, wires in wiring.layers.items():
        taps = torch.Size(shapes[name][2:]).numel()
        before = {roles[other] for other in roles if torch.isin(wiring.layers[other].targets, wires.sources).any()}
        if where[name].reads_input:
            roles[name] = FULL
        elif where[name].block or where[name].beside:
            roles[name] = SPARE
        else:
            roles[name] = KERNELS if taps > 1 and KERNELS not in before else PAIRS
    return roles


def _widest(layers: Mapping[str, _Layer], wiring: Wiring, total: int, order: Tensor) -> dict[str, Tensor] | None:
    """The pairs of channels that each layer connects in the widest pattern of at most `total` weights, None where even
    one channel is too many. Of every set that a layer reads or writes as a whole the first channels in `order` are
    used, and of the network's own channels all."""
    found, low, high = None, 0, max(max(layer.taps.shape) for layer in layers.values())
    while low < high:
        width = (low + high + 1) // 2
        chosen = torch.zeros(wiring.size, dtype=torch.bool)
        chosen[0] = chosen[wiring.inputs] = chosen[wiring.outputs] = True
        for layer in layers.values():
            for side in (layer.wires.sources, layer.wires.targets):
                chosen[side[order[side].argsort(descending=True)[:width]]] = True
        pairs = {name: _pairs(layer, chosen, order) for name, layer in layers.items()}
        if sum(int(layer.taps[pairs[name]].sum()) for name, layer in layers.items()) <= total:
            found, low = pairs, width
        else:
            high = width - 1
    return found


def _pairs(layer: _Layer, chosen: Tensor, order: Tensor) -> Tensor:
    """Which pairs of channels [first dimension, second] a layer connects."""
    source, target = (side.expand(layer.taps.shape) for side in (layer.wires.source, layer.wires.target))
    pairs = chosen[source] & chosen[target] & (layer.taps > 0)
    if not pairs.any():
        pairs = layer.taps > 0
    if layer.role in (FULL, PAIRS):
        return pairs
    return _matched(source, target, pairs, order, every=layer.role == KERNELS)


def _mask(layer: _Layer, pairs: Tensor) -> Tensor:
    """The layer's mask as [first dimension, second, taps]: of each pair all possible taps, or the one nearest to the
    kernel's centre."""
    if layer.role in (FULL, KERNELS):
        return layer.possible & pairs.unsqueeze(2)
    taps = layer.possible.shape[2]
    nearness = taps - (torch.arange(taps) - taps // 2).abs()
    place = pairs.nonzero(as_tuple=True)
    mask = torch.zeros_like(layer.possible)
    mask[(*place, torch.where(layer.possible[place], nearness, 0).argmax(1))] = True
    return mask


def _matched(source: Tensor, target: Tensor, pairs: Tensor, order: Tensor, every: bool) -> Tensor:
    """Of the pairs [first dimension, second] so many that each channel among them has one, the first in order; or the
    first of all."""
    at = pairs.flatten().nonzero().flatten()
    source, target = source.reshape(-1)[at], target.reshape(-1)[at]
    rank = order[source] + order[target]
    picked = cover(source, target, torch.ones_like(order, dtype=torch.bool), rank) if every else rank.argmax()
    matched = torch.zeros(pairs.numel(), dtype=torch.bool)
    matched[at[picked]] = True
    return matched.view(pairs.shape)


def _fill(
    masks: Mapping[str, Tensor],
    missing: int,
    allowed: Sequence[Mapping[str, Tensor]],
    generator: torch.Generator,
) -> None:
    """Add `missing` weights at random, in place: at the first of the allowed positions, then at the next."""
    for positions in allowed:
        free = [(positions[name] & ~mask).flatten() for name, mask in masks.items()]
        at = torch.cat(free)
        count = min(missing, int(at.sum()))
        added = torch.zeros_like(at)
        if count:
            added[top_k(torch.rand(len(at), generator=generator), count, at, generator)] = True
        for mask, more in zip(masks.values(), added.split([len(each) for each in free]), strict=True):
            mask.view(-1).logical_or_(more)
        missing -= count
        if not missing:
            return


def _between(mask: Tensor, layer: _Layer) -> Tensor:
    """The positions between channels that the layer uses, none where it is spare."""
    if layer.role == SPARE:
        return torch.zeros_like(mask)
    taps = mask.flatten(2).any(2) if mask.dim() > 2 else mask
    between = taps.any(1)[:, None] & taps.any(0)[None, :]
    return between.view(*between.shape, *[1] * (mask.dim() - 2)) & layer.possible.view(mask.shape)
