"""Masks from what the training loss says of the initial weights, on a few of the data's batches.

Each is a score of every weight at initialisation; the highest over all layers stay. The network is in training mode
and otherwise as it is: the values that are scored are those that training begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..protocols import option
from ..registry import allocation
from .saliency import Masks, Saliency, keep_highest, left_after
from .sample import LossOfWeights, Sample, gradient_of


@dataclass(frozen=True)
class _Sensitivity(Saliency):
    """An allocation that looks at the loss."""

    def __call__(
        self,
        model: nn.Module,
        budgets: Mapping[str, int],
        input_shape: Sequence[int] | None,
        generator: torch.Generator,
        sample: Sample,
    ) -> Masks:
        """Boolean CPU tensors with the sum of the budgets active, at least one a layer; the model is left as it was."""
        loss = LossOfWeights(model, budgets, sample)
        with loss.ready():
            masks, scores = self.scored(loss, sum(budgets.values()), generator)
        return self.repaired(model, masks, scores, input_shape, generator)

    def scored(self, loss: LossOfWeights, total: int, generator: torch.Generator) -> tuple[Masks, Masks]:
        """Masks with `total` active weights, and what they were chosen by."""
        raise NotImplementedError


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"`{name}` must be over 0, got {value}")


@allocation.register("snip", draws=True, keeps_counts=True, needs_weights=True, needs_input=False, needs_data=True)
@dataclass(frozen=True)
class Snip(_Sensitivity):
    """SNIP (Lee et al. 2019): the weights with the highest connection sensitivity |w dL/dw|, found at once.

    That is |dL/dc| of gates c before the weights, at c = 1 (Section 4.1). Published: one batch of 128 images.
    """

    batches: int = option(1, "training batches that the gradient is averaged over", type=int)

    def __post_init__(self) -> None:
        _check_positive(batches=self.batches)

    def scored(self, loss: LossOfWeights, total: int, generator: torch.Generator) -> tuple[Masks, Masks]:
        return _rounds(loss, total, generator, 1, self.batches, resurrect=False)


@allocation.register("force", draws=True, keeps_counts=True, needs_weights=True, needs_input=False, needs_data=True)
@dataclass(frozen=True)
class Force(_Sensitivity):
    """FORCE (de Jorge et al. 2021): |w dL/dw| with the gradient of the pruned network, over all weights again in each
    round, so that pruned ones come back.

    Published: 60 rounds of exponential pruning, each on new batches: 1 for CIFAR-10, 10 for CIFAR-100, 20 for Tiny
    ImageNet and 40 for ImageNet (the authors' code, naver/force). One round is SNIP.
    """

    rounds: int = option(60, "rounds, each pruning to the same share of the last one", type=int)
    batches: int = option(1, "training batches that each round's gradient is averaged over", type=int)

    def __post_init__(self) -> None:
        _check_positive(rounds=self.rounds, batches=self.batches)

    def scored(self, loss: LossOfWeights, total: int, generator: torch.Generator) -> tuple[Masks, Masks]:
        return _rounds(loss, total, generator, self.rounds, self.batches, resurrect=True)


@allocation.register("iter_snip", draws=True, keeps_counts=True, needs_weights=True, needs_input=False, needs_data=True)
@dataclass(frozen=True)
class IterSnip(Force):
    """Iterative SNIP (de Jorge et al. 2021; SNIP-it, Verdenius et al. 2020): |w dL/dw| of the pruned network in 60
    rounds of exponential pruning; what is pruned stays so."""

    def scored(self, loss: LossOfWeights, total: int, generator: torch.Generator) -> tuple[Masks, Masks]:
        return _rounds(loss, total, generator, self.rounds, self.batches, resurrect=False)


@allocation.register("grasp", draws=True, keeps_counts=True, needs_weights=True, needs_input=False, needs_data=True)
@dataclass(frozen=True)
class Grasp(_Sensitivity):
    """GraSP (Wang et al. 2020): the weights whose removal reduces the gradient flow most, by w * Hg, H the Hessian and
    g the gradient of the loss.

    Hg is found exactly, by differentiating g * g' with g' held. Published: 10 images of each class, outputs over a
    temperature of 200. Their batches are those in which the images come.
    """

    per_class: int = option(10, "images of each class", type=int)
    temperature: float = option(200.0, "what the network's outputs are divided by", type=float)

    def __post_init__(self) -> None:
        _check_positive(per_class=self.per_class, temperature=self.temperature)

    def scored(self, loss: LossOfWeights, total: int, generator: torch.Generator) -> tuple[Masks, Masks]:
        with torch.no_grad():
            output = loss.output(loss.weights, loss.sample.next())
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise UsageError("`sparse_init` grasp takes images of each class: the model must give [images, classes]")
        batches = loss.sample.of_each_class(self.per_class, output.shape[1])
        shares = [len(y) / sum(len(y) for _, y in batches) for _, y in batches]
        gradient = {name: torch.zeros_like(weight) for name, weight in loss.weights.items()}
        flow = {name: torch.zeros_like(weight) for name, weight in loss.weights.items()}
        for batch, share in zip(batches, shares, strict=True):
            leaves = loss.leaves()
            for name, grad in gradient_of(loss.loss(leaves, batch, self.temperature), leaves).items():
                gradient[name] += share * grad.detach()
        for batch, share in zip(batches, shares, strict=True):
            leaves = loss.leaves()
            grads = gradient_of(loss.loss(leaves, batch, self.temperature), leaves, create_graph=True)
            product = torch.stack([(grads[name] * gradient[name]).sum() for name in leaves]).sum()
            for name, curved in gradient_of(product, leaves).items():
                flow[name] += share * curved.detach()
        scores = loss.split({name: weight * flow[name] for name, weight in loss.weights.items()})
        everywhere = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        return keep_highest(everywhere, list(scores.values()), total, generator), scores


def _rounds(
    loss: LossOfWeights, total: int, generator: torch.Generator, rounds: int, batches: int, resurrect: bool
) -> tuple[Masks, Masks]:
    """Prune to `total` weights in rounds by |w dL/dw|, the gradient that of the network as the last round left it.
    What was pruned may come back where `resurrect`."""
    whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in loss.weights.items()}
    masks, size = whole, sum(mask.numel() for mask in whole.values())
    for turn in range(1, rounds + 1):
        grads = loss.gradients(masks, batches)
        scores = loss.split({name: (weight * grads[name]).abs() for name, weight in loss.weights.items()})
        eligible = loss.split(whole if resurrect else masks)
        kept = keep_highest(eligible, list(scores.values()), left_after(turn, rounds, size, total), generator)
        masks = {name: torch.cat([kept[key] for key in keys]) for name, keys in loss.keys.items()}
    return kept, scores
