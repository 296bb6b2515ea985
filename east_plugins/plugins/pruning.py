"""Prune rules: the importance of every weight; the lowest is dropped first. Only active positions are compared.

An importance of `inf` says: do not replace this weight (the host then replaces fewer; the active count stays
exact).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .protocols import Layer, option
from .registry import pruning


@pruning.register("magnitude", pointwise=True)
def magnitude(layer: Layer) -> Tensor:
    """Magnitude of the weight."""
    return layer.weight.abs()


@pruning.register("SET")
@dataclass(frozen=True)
class SmallestOfEachSign:
    """Zeros, then the smallest positive and the largest negative weights, as many of each as there are (SET, Mocanu et
    al. 2018).

    An importance is a weight's rank among those of its sign, so that the lowest of all are half of either sign as far
    as there are any; equal weights are ranked at random. Zeros, which a weight without gradient stays at, are of no
    sign: counted as of one, they would leave its weights alone and wear the other's away.
    """

    def __call__(self, layer: Layer) -> Tensor:
        return self.over_layers([layer])[0]

    def over_layers(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Ranks among the active weights of one sign of all layers together, for pruning over all layers."""
        active = torch.cat([layer.weight[layer.mask].float() for layer in layers])
        ranks = torch.full_like(active, -1)
        for one_sign in (active > 0, active < 0):
            size = active[one_sign].abs()
            shuffled = torch.randperm(len(size), generator=layers[0].generator).to(size.device)
            order = shuffled[size[shuffled].argsort(stable=True)]
            ranks[one_sign] = torch.empty_like(size).index_copy_(0, order, torch.arange(len(size)).to(size))
        parts = ranks.split([int(layer.mask.sum()) for layer in layers])
        return [
            torch.zeros_like(layer.weight, dtype=torch.float32).masked_scatter_(layer.mask, part)
            for layer, part in zip(layers, parts, strict=True)
        ]


@pruning.register("threshold", pointwise=True)
@dataclass(frozen=True)
class Threshold:
    """Magnitudes up to the threshold, and those alone: larger weights are not replaced (sparse_learning)."""

    threshold: float = option(0.001, "largest magnitude that is pruned", type=float)

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise UsageError(f"`threshold` must be at least 0, got {self.threshold}")

    def __call__(self, layer: Layer) -> Tensor:
        size = layer.weight.abs()
        return size.masked_fill(size > self.threshold, torch.inf)


@pruning.register("taylor", needs=("grad",), pointwise=True)
@pruning.register("Taylor_FO", needs=("grad",), pointwise=True)
def taylor(layer: Layer) -> Tensor:
    """First-order change of the loss, (weight * gradient)^2 (Molchanov et al. 2019; ITOP's Taylor_FO)."""
    return (layer.weight * layer.grad).square()


@pruning.register("random", pointwise=True)
def random(layer: Layer) -> Tensor:
    """Any active weight, equally likely: all importances tie, the host draws."""
    return layer.weight.new_zeros(()).expand_as(layer.weight)


@pruning.register("MEST", needs=("grad",), pointwise=True)
@dataclass(frozen=True)
class MEST:
    """Magnitude and where it is heading, |weight| + lam * |gradient| (MEST, Yuan et al. 2021)."""

    lam: float = option(1.0, "factor on the gradient's magnitude", type=float)

    def __post_init__(self) -> None:
        if not 0 <= self.lam < torch.inf:
            raise UsageError(f"`lam` must be at least 0, got {self.lam}")

    def __call__(self, layer: Layer) -> Tensor:
        return layer.weight.abs() + self.lam * layer.grad.abs()


#: Keeps quotients finite. Of weights with equal zeros below the line the other factor decides.
_EPSILON = 1e-8


@pruning.register("sensitivity", needs=("grad",), pointwise=True)
def sensitivity(layer: Layer) -> Tensor:
    """Relative change that the gradient asks for, |gradient| / |weight| (Naji et al. 2021)."""
    return layer.grad.abs() / (layer.weight.abs() + _EPSILON)


@pruning.register("rsensitivity", needs=("grad",), pointwise=True)
@pruning.register("ReciprocalSensitivity", needs=("grad",), pointwise=True)
def rsensitivity(layer: Layer) -> Tensor:
    """Weights that the gradient leaves as they are: |weight| / |gradient| (Nowak et al. 2023, Section 3.2)."""
    return layer.weight.abs() / (layer.grad.abs() + _EPSILON)


@pruning.register("SNIP", needs=("grad",), pointwise=True)
def snip(layer: Layer) -> Tensor:
    """First-order change of the loss without the weight, |weight * gradient| (Lee et al. 2019; in dynamic sparse
    training Nowak et al. 2023)."""
    return (layer.weight * layer.grad).abs()


@dataclass(frozen=True)
class Running:
    """A score averaged over steps, `average <- beta * average + (1 - beta) * score` since the weight became active.

    The host calls `score` after every step with the active weights of a layer, one dimension, and keeps the average.
    """

    beta: float = option(0.9, "share of the average that stays at each step", type=float)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(f"`beta` must be from 0 on and below 1, got {self.beta}")

    def __call__(self, layer: Layer) -> Tensor:
        return layer.average


@pruning.register("RunningMagnitude", needs=("average",), pointwise=True)
class RunningMagnitude(Running):
    """Magnitude of the weight, averaged over steps (Nowak et al. 2023, their code)."""

    def score(self, layer: Layer) -> Tensor:
        return magnitude(layer)


@pruning.register("RunningSNIP", needs=("average",), pointwise=True)
class RunningSNIP(Running):
    """|weight * gradient|, averaged over steps (Nowak et al. 2023, their code)."""

    def score(self, layer: Layer) -> Tensor:
        return snip(layer)


@pruning.register("bilevel", needs=("average",), pointwise=True)
@dataclass(frozen=True)
class Bilevel(Running):
    """What the mask gains by keeping the weight, averaged over steps (BiP, Zhang et al. 2022).

    The mask m is the upper level of a bi-level problem, the weights under it the lower one, with a penalty of `gamma`
    / 2 * |w|^2. By its implicit gradient the loss falls by (g / gamma - w) * g as m goes from 0 to 1, where g is the
    gradient of the masked weights.
    """

    gamma: float = option(1.0, "weight of the lower level's penalty", type=float)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < torch.inf:
            raise UsageError(f"`gamma` must be over 0, got {self.gamma}")

    def score(self, layer: Layer) -> Tensor:
        return (layer.grad / self.gamma - layer.weight) * layer.grad


@pruning.register("dormant", needs=("grad",))
@dataclass(frozen=True)
class Dormant:
    """Negative weights that hold dormant neurons down, largest first; then the smallest magnitudes (after NeurRev, Li
    et al. 2024).

    A neuron is a row of the weight, [out, everything else]. A ReLU that passes nothing gives its neuron no gradient:
    dormant is whose mean |gradient| is at most `tau` times the layer's.
    """

    tau: float = option(0.01, "share of the layer's mean |gradient| up to which a neuron is dormant", type=float)

    def __post_init__(self) -> None:
        if not 0 <= self.tau < torch.inf:
            raise UsageError(f"`tau` must be at least 0, got {self.tau}")

    def __call__(self, layer: Layer) -> Tensor:
        size = layer.grad.abs().flatten(1).mean(1)
        dormant = (size <= self.tau * size.mean()).view(-1, *[1] * (layer.weight.dim() - 1))
        return torch.where(dormant & (layer.weight < 0), layer.weight, layer.weight.abs())
