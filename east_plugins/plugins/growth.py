"""Growth rules: one score a weight, higher is grown first. Only inactive positions are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops.communities import ch3_l3
from .protocols import Layer, option
from .registry import growth


@growth.register("random")
def random(layer: Layer) -> Tensor:
    """Any inactive weight, equally likely (SET, Mocanu et al. 2018): all scores tie, the host draws."""
    return layer.weight.new_zeros(()).expand_as(layer.weight)


@growth.register("random_unfired")
def random_unfired(layer: Layer) -> Tensor:
    """At random among weights never active so far, then among the others (ITOP, Liu et al. 2021)."""
    return (~layer.fired).float()


@growth.register("gradient", needs=("grad",))
def gradient(layer: Layer) -> Tensor:
    """Largest magnitude of the dense gradient (RigL, Evci et al. 2020)."""
    return layer.grad.abs()


@growth.register("averaged_gradient", needs=("mean_grad",))
@dataclass(frozen=True)
class AveragedGradient:
    """Largest magnitude of the dense gradient averaged over several batches: RigL's growth, with less noise.

    They are the batches of the last steps up to the update, each step's at the weights it began with, as
    rigl-torch's `grad_accumulation_n` has them. In these steps the dense gradient is computed.
    """

    batches: int = option(8, "steps, up to the update, whose gradients are averaged", type=int)

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UsageError(f"`batches` must be at least 1, got {self.batches}")

    def __call__(self, layer: Layer) -> Tensor:
        return layer.mean_grad.abs()


@growth.register("memory", needs=("memory",))
def memory(layer: Layer) -> Tensor:
    """Largest magnitude of the value that the weight had when it was dropped, or at first (Top-KAST, Jayakumar et al.
    2020); it begins with that value again."""
    return layer.memory.abs()


@growth.register("momentum", needs=("momentum",))
def momentum(layer: Layer) -> Tensor:
    """Largest magnitude of the dense running average of gradients (SNFS, Dettmers and Zettlemoyer 2019)."""
    return layer.momentum.abs()


@growth.register("momentum_neuron", needs=("momentum",))
def momentum_neuron(layer: Layer) -> Tensor:
    """To each neuron in proportion to its mean |momentum|, inside it by largest |momentum| (sparse_learning).

    The score `share / (2 * rank + 1)` makes the top k the proportional seats of Webster and Sainte-Lague, for
    every k; `rank` counts the neuron's inactive weights from its largest momentum.
    """
    size = layer.momentum.abs().flatten(1)
    share = size.mean(1, keepdim=True)
    rank = size.masked_fill(layer.mask.flatten(1), -1).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (share / (2 * rank + 1)).view_as(layer.weight).to(torch.float32)


@growth.register("ch3-l3")
def cannistraci_hebb(layer: Layer) -> Tensor:
    """Links that most and most closed paths of length 3 predict, without gradients (CHT, Zhang et al. 2024).

    Neurons are the rows and inputs the columns of the weight as a matrix, [out, everything else]. Scores are of the
    topology after pruning; pairs on no path tie at zero, of which the host draws.
    """
    return ch3_l3(layer.mask.flatten(1)).view_as(layer.weight)
