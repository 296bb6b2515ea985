"""Masks from the values that a network comes with: pretrained, or pruned already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops import checkpoints
from ..protocols import option
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


@allocation.register("pruned", draws=True, keeps_counts=True, needs_weights=False, needs_input=False)
@dataclass(frozen=True)
class Pruned:
    """The masks of a run at its end; where the density is smaller, the largest of its weights over all layers (one
    step of iterative magnitude pruning). The network itself may have other weights.

    Raises `UsageError` where the run is of another network, or has fewer active weights than the density asks for.
    """

    run: str = option("", "folder of the run", metavar="DIR")

    def __call__(
        self, model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        if not self.run:
            raise UsageError("`sparse_init` pruned needs `sparse_init_run`, the folder of a run")
        weights, masks = checkpoints.end_of(self.run)
        blocks = _blocks(budgets)
        theirs = {name: weights[name].shape for name in masks}
        if theirs != {name: model.get_parameter(name).shape for name in blocks}:
            raise UsageError(f"`sparse_init_run` {self.run} is a run of another network")
        sizes = {key: part for name, keys in blocks.items()
                 for key, part in zip(keys, weights[name].abs().double().chunk(len(keys)), strict=True)}  # fmt: skip
        active = {key: part for name, keys in blocks.items()
                  for key, part in zip(keys, masks[name].chunk(len(keys)), strict=True)}  # fmt: skip
        total, found = sum(budgets.values()), sum(int(mask.sum()) for mask in active.values())
        if found < total:
            raise UsageError(
                f"`sparse_init_run` {self.run} has {found} active weights, and the density asks for {total}"
            )
        return active if found == total else keep_highest(active, list(sizes.values()), total, generator)


def _matrices(model: nn.Module, names: Sequence[str] | Mapping[str, int]) -> dict[str, Tensor]:
    """The weights on the CPU. Names like `lstm.weight_ih_l0[2]` are those of one of several matrices in a parameter,
    one below the other."""
    found: dict[str, Tensor] = {}
    for name, keys in _blocks(names).items():
        found.update(zip(keys, model.get_parameter(name).detach().cpu().chunk(len(keys)), strict=True))
    return found


def _blocks(names: Sequence[str] | Mapping[str, int]) -> dict[str, list[str]]:
    """Parameters to the names of the matrices in them."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.partition("[")[0], []).append(name)
    return blocks
