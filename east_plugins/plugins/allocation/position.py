"""Allocations by a layer's position in the network: what stands between input and output, and what is beside it.

In a residual network the identity leads past a block for nothing, so that a block may be left nearly empty; the
layers that every path crosses may not. Positions come from the traced wiring (`ops.channels`), not from names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...ops.channels import Wires, Wiring, trace
from ..registry import allocation


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    `block`: the number, from 1, of the residual block among those that read and write the same stream, 0 for a layer
    in none. A block that opens a stream beside a projection is number 1, and the next one 2; the layers of an opening
    block lie on no loop and have 0. `beside`: a longer path leads around the layer, as around the projection beside a
    block. `reads_input` and `writes_output`: the layer touches the network's own channels.
    """

    shape: tuple[int, ...]
    block: int
    beside: bool
    reads_input: bool
    writes_output: bool


@allocation.register("first-blocks", places=True)
def first_blocks(place: Place) -> float:
    """The same number in every layer, but a 64th in residual blocks after the first of their stage."""
    return 1 / 64 if place.block > 1 else 1


def places(model: nn.Module, shapes: Mapping[str, Sequence[int]], input_shape: Sequence[int]) -> dict[str, Place]:
    """The place of every layer whose weight has the given name and shape; the model is left as it was."""
    return placed(trace(model, shapes, input_shape), shapes)


def placed(wiring: Wiring, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """The place of every layer of a traced wiring."""
    blocks, beside = _positions(list(wiring.layers.values()), wiring.inputs, wiring.size)
    return {
        name: Place(
            tuple(shapes[name]),
            block,
            around,
            bool(torch.isin(wiring.inputs, wires.sources).any()),
            bool(torch.isin(wiring.outputs, wires.targets).any()),
        )
        for (name, wires), block, around in zip(wiring.layers.items(), blocks, beside, strict=True)
    }


def _positions(layers: Sequence[Wires], inputs: Tensor, size: int) -> tuple[list[int], list[bool]]:
    """`Place.block` and `Place.beside` of every layer.

    A residual block is a loop: its layers lead from channels back to the same channels. Of the channels of loops that
    hang together those are the stream that something outside writes as well.
    """
    reads, writes = (np.zeros((len(layers) + 1, size), dtype=bool) for _ in range(2))
    for i, wires in enumerate(layers):
        reads[i, wires.sources], writes[i, wires.targets] = True, True
    writes[-1, inputs] = True
    reads, writes = np.split(np.unique(np.concatenate([reads, writes]), axis=1), 2)  # of equal channels one
    follows = _meet(writes, reads)
    one_to_one = np.array([*(bool((w.source == w.target).all()) for w in layers), True])
    follows[np.ix_(one_to_one, one_to_one)] = False  # depthwise layers of the same channels are no loop
    reach = _closure(follows)
    loops, number = reach & reach.T, np.zeros(len(layers) + 1, dtype=int)
    for layer in np.flatnonzero(loops.diagonal()):
        if not number[layer]:
            members = np.flatnonzero(loops[layer])
            number[members] = _numbered(reads, writes, members, one_to_one[members])
    beside = [
        not number[layer] and _has_detour(reads, writes, follows, number > 0, layer) for layer in range(len(layers))
    ]
    return number[:-1].tolist(), beside


def _has_detour(reads: np.ndarray, writes: np.ndarray, follows: np.ndarray, looped: np.ndarray, layer: int) -> bool:
    """Whether two or more layers on no loop lead from the layer's sources to its targets."""
    others = ~looped
    others[layer] = False
    ends = others & (writes & writes[layer]).any(1)
    now, seen = others & (reads & reads[layer]).any(1), np.zeros_like(others)
    while ends.any() and now.any():
        seen |= now
        now = others & follows[now].any(0) & ~seen
        if (now & ends).any():
            return True
    return False


def _numbered(reads: np.ndarray, writes: np.ndarray, members: np.ndarray, one_to_one: np.ndarray) -> np.ndarray:
    """The block of every one of the layers `members`, which form loops: blocks are what hangs together beside the
    stream, in the order of their first layers; 0 for a depthwise layer on the stream itself."""
    outside = np.delete(writes, members, axis=0).sum(0)
    reads, writes = reads[members], writes[members]
    stream = reads.any(0) & writes.any(0) & (outside > 0)
    touches = (reads | writes)[:, ~stream]
    inside = touches.any(1) | ~one_to_one
    together = _closure(_meet(touches, touches) | np.eye(len(members), dtype=bool))
    opened = int(outside[stream].max(initial=0) > 1)  # by a block beside its projection, which is the first
    number = np.zeros(len(members), dtype=int)
    number[inside] = np.unique(together[inside].argmax(1), return_inverse=True)[1] + 1 + opened
    return number


def _meet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of `a` have a true element where which rows of `b` have one."""
    return a.astype(np.float32) @ b.astype(np.float32).T > 0


def _closure(relation: np.ndarray) -> np.ndarray:
    """The transitive closure of a square relation."""
    while True:
        wider = relation | _meet(relation, relation.T)
        if np.array_equal(wider, relation):
            return relation
        relation = wider
