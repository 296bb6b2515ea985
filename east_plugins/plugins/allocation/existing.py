"""Masks from the values that a network comes with: pretrained, or pruned already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..registry import allocation
from .saliency import keep_highest


@allocation.register("lottery_ticket", draws=True, keeps_counts=True, needs_weights=True, needs_input=False)
@allocation.register("magnitude", draws=True, keeps_counts=True, needs_weights=True, needs_input=False)
def magnitude(
    model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int] | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """The largest weights of the network as it is, compared over all layers; every layer keeps at least one."""
    sizes = {name: weight.abs().double() for name, weight in _matrices(model, budgets).items()}
    everywhere = {name: torch.ones_like(size, dtype=torch.bool) for name, size in sizes.items()}
    return keep_highest(everywhere, list(sizes.values()), sum(budgets.values()), generator)


@allocation.register("resume", draws=True, keeps_counts=True, needs_weights=True, needs_input=False)
def resume(
    model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int] | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """The nonzero weights of a network that is sparse already, such as a pruned checkpoint; the density must be its.

    Raises `UsageError` where it has another number of nonzero weights.
    """
    masks = {name: weight != 0 for name, weight in _matrices(model, budgets).items()}
    found, total, size = (sum(counts) for counts in (
        [int(mask.sum()) for mask in masks.values()], budgets.values(), [mask.numel() for mask in masks.values()]
    ))  # fmt: skip
    if found != total:
        raise UsageError(
            f"`sparse_init` resume: {found} of the model's {size} weights are nonzero, and the density asks for "
            f"{total}; give density={found / size!r}"
        )
    return masks


def _matrices(model: nn.Module, names: Sequence[str] | Mapping[str, int]) -> dict[str, Tensor]:
    """The weights on the CPU. Names like `lstm.weight_ih_l0[2]` are those of one of several matrices in a parameter,
    one below the other."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.partition("[")[0], []).append(name)
    found: dict[str, Tensor] = {}
    for name, keys in blocks.items():
        found.update(zip(keys, model.get_parameter(name).detach().cpu().chunk(len(keys)), strict=True))
    return found
