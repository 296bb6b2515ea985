"""Masks from the initial weights' saliency, the layers' shares left to the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.paths import Twin, gradients, run_with
from ...ops.select import top_k
from ..protocols import option
from ..registry import allocation
from .connected import reconnect

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Saliency:
    """What allocations by saliency have in common.

    With `connected`, active weights that lie on no path from input to output move to the positions on one with the
    highest saliency, every layer's count as it is.
    """

    connected: bool = option(False, "weights on no path from input to output move onto one, by saliency")

    def repaired(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        input_shape: Sequence[int] | None,
        generator: torch.Generator,
    ) -> Masks:
        """The masks on the CPU, connected where that is asked for. `scores` are those of all positions."""
        found = {name: mask.cpu() for name, mask in masks.items()}
        if self.connected:
            assert input_shape is not None  # the host has seen to it
            before = {name: mask.clone() for name, mask in found.items()}
            ranked = {name: score.detach().double().cpu() for name, score in scores.items()}
            reconnect(model, found, before, ranked, input_shape, generator)
        return found


class _Products(Twin):
    """The linearised twin with the values themselves in place of zeros and ones."""

    @staticmethod
    def layer(func, input, weight, bias=None, *args, **kwargs):
        return func(input, weight, None, *args, **kwargs)


@allocation.register("synflow", draws=True, keeps_counts=True, needs_weights=True)
@dataclass(frozen=True)
class SynFlow(Saliency):
    """SynFlow (Tanaka et al. 2020): the weights with the most synaptic flow |w dR/dw|, pruned in 100 rounds.

    R is the output's sum on an input of ones with weights |w|, norms and activations left out. Each round prunes to
    the same share of what the last one left (Section 6). No data.
    """

    rounds: int = option(100, "rounds of pruning", type=int)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"`rounds` must be at least 1, got {self.rounds}")

    def __call__(
        self, model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int], generator: torch.Generator
    ) -> Masks:
        """`budgets` gives the total only; every layer keeps at least one weight. Boolean CPU tensors; the model is left
        as it was."""
        weights = {name: model.get_parameter(name).detach().abs().double() for name in budgets}
        size, total = sum(weight.numel() for weight in weights.values()), sum(budgets.values())
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        for turn in range(1, self.rounds + 1):
            scores = synaptic_flow(model, weights, masks, input_shape)
            count = left_after(turn, self.rounds, size, total)
            masks = keep_highest(masks, list(scores.values()), count, generator)
        return self.repaired(model, masks, scores, input_shape, generator)


def synaptic_flow(
    model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], input_shape: Sequence[int]
) -> Masks:
    """|w| dR/d|w| at the masked weights, of all positions; `weights` are magnitudes in float64."""
    device = next(iter(weights.values())).device
    x = torch.ones(1, *input_shape, dtype=torch.float64, device=device, requires_grad=True)
    leaves = {name: (weight * masks[name]).detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad():
        run_with(model, leaves, x, _Products(), backward=True)
    return {name: weights[name] * flow for name, flow in zip(weights, gradients(leaves), strict=True)}


def left_after(turn: int, rounds: int, size: int, total: int) -> int:
    """Weights left after a round of exponential pruning from `size` to `total`."""
    return round(size * (total / size) ** (turn / rounds))


def keep_highest(
    masks: Mapping[str, Tensor], scores: Sequence[Tensor], count: int, generator: torch.Generator
) -> Masks:
    """The `count` active positions with the highest scores over all layers, the best of every layer among them."""
    lowest = torch.finfo(scores[0].dtype).min  # also of scores that are no numbers
    ranked = [
        score.detach().nan_to_num(lowest).masked_fill(~mask, -torch.inf).flatten()
        for score, mask in zip(scores, masks.values(), strict=True)
    ]
    for score in ranked:
        score[score.argmax()] = torch.inf
    flat, active = torch.cat(ranked), torch.cat([mask.flatten() for mask in masks.values()])
    kept = torch.zeros_like(active)
    kept[top_k(flat, count, active, generator)] = True
    parts = kept.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}
