"""Masks from the initial weights' saliency, the layers' shares left to the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...ops.paths import Twin, gradients, run_with
from ...ops.select import top_k
from ..registry import allocation

#: Rounds of pruning, each to the same fraction of what the last one left (Tanaka et al. 2020, Section 6).
ROUNDS = 100


class _Products(Twin):
    """The linearised twin with the values themselves in place of zeros and ones."""

    @staticmethod
    def layer(func, input, weight, bias=None, *args, **kwargs):
        return func(input, weight, None, *args, **kwargs)


@allocation.register("synflow", draws=True, keeps_counts=True, needs_weights=True)
def synflow(
    model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    """SynFlow (Tanaka et al. 2020): the weights with the most synaptic flow |w dR/dw|, pruned in 100 rounds.

    R is the output's sum on an input of ones with weights |w|, norms and activations left out. `budgets` gives the
    total only; every layer keeps at least one weight. Boolean CPU tensors; the model is left as it was.
    """
    weights = {name: model.get_parameter(name).detach().abs().double() for name in budgets}
    size, total = sum(weight.numel() for weight in weights.values()), sum(budgets.values())
    x = torch.ones(1, *input_shape, dtype=torch.float64, device=next(iter(weights.values())).device, requires_grad=True)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for turn in range(1, ROUNDS + 1):
        leaves = {name: (weight * masks[name]).detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            run_with(model, leaves, x, _Products(), backward=True)
        scores = [(leaf * flow).detach() for leaf, flow in zip(leaves.values(), gradients(leaves), strict=True)]
        masks = keep_highest(masks, scores, round(size * (total / size) ** (turn / ROUNDS)), generator)
    return {name: mask.cpu() for name, mask in masks.items()}


def keep_highest(
    masks: Mapping[str, Tensor], scores: Sequence[Tensor], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The `count` active positions with the highest scores over all layers, the best of every layer among them."""
    ranked = [score.masked_fill(~mask, -1).flatten() for score, mask in zip(scores, masks.values(), strict=True)]
    for score in ranked:
        score[score.argmax()] = torch.inf
    flat, active = torch.cat(ranked), torch.cat([mask.flatten() for mask in masks.values()])
    kept = torch.zeros_like(active)
    kept[top_k(flat, count, active, generator)] = True
    parts = kept.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}
