"""Which channels of a network any active weight touches; all others are constants that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.active import Active
from ..ops.channels import trace
from ..ops.maskable import layers, maskable
from ..ops.paths import plain_evaluation
from ..ops.substitute import substituted


class Liveness:
    """Channels that must be computed, from masks; the network's wiring is found once.

    A channel is *touched* where an active weight writes or reads it, and then computed in full in every tensor that
    it runs through (one residual stream is one set of channels). What no weight touches is a constant that nobody
    reads: its gradients are zero and its running statistics decay towards zero, so it can be left out exactly.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int]):
        named = {id(weight): name for name, weight in maskable(model).items()}
        self.layers = {module: named[id(module.weight)] for _, module in layers(model)}
        self.norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self.wiring = trace(model, {n: w.shape for n, w in maskable(model).items()}, input_shape, self.norms)
        always = [self.wiring.inputs, self.wiring.outputs, torch.zeros(1, dtype=torch.long)]
        always += [self.wiring.norms[name] for name in _fed_by_constants(model, self.norms, input_shape)]
        self.always = torch.cat(always)

    def kept(self, active: Mapping[str, Active]) -> dict[nn.Module, tuple[Tensor, ...]]:
        """Kept channels, ascending, of every layer (inputs, outputs) and norm, by the active weights of masked layers;
        others keep all."""
        keep = torch.zeros(self.wiring.size, dtype=torch.bool)
        keep[self.always] = True
        for name, wires in self.wiring.layers.items():
            if name not in active:
                keep[wires.sources] = keep[wires.targets] = True
                continue
            target, source = (axis.cpu() for axis in active[name].coordinates[:2])
            for labels in (wires.source, wires.target):
                keep[labels.expand(active[name].shape[:2])[target, source]] = True
        found = {}
        for module, name in self.layers.items():
            sides = (_of_layer(side, module, count) for side, count in self._sides(module, name))
            found[module] = tuple(keep[labels].nonzero().squeeze(1) for labels in sides)
        for name, module in self.norms.items():
            found[module] = (keep[self.wiring.norms[name]].nonzero().squeeze(1),)
        return found

    def _sides(self, module: nn.Module, name: str):
        wires = self.wiring.layers[name]
        groups = getattr(module, "groups", 1)
        outputs = module.weight.shape[0]
        source = wires.source[:: outputs // groups] if groups > 1 else wires.source
        return (source, module.weight.shape[1] * groups), (wires.target, outputs)


def _of_layer(labels: Tensor, module: nn.Module, count: int) -> Tensor:
    """One label a channel; a layer that the pass did not reach has label 0, which is always kept."""
    return labels.flatten() if labels.numel() == count else torch.zeros(count, dtype=torch.long)


@torch.no_grad()
def _fed_by_constants(model: nn.Module, norms: Mapping[str, nn.Module], input_shape: Sequence[int]) -> set[str]:
    """Norms whose input is not zero when all layers' weights are: biases reach them, so that their running
    statistics cannot be known without computing them."""
    weights = {id(weight) for weight in maskable(model).values()}
    values = {
        id(p): torch.zeros_like(p) if id(p) in weights else torch.ones_like(p)
        for name, p in model.named_parameters()
        if id(p) in weights or not name.endswith("bias") or _of_norm(name, norms)
    }
    fed: set[str] = set()

    def note(name):
        return lambda module, args: fed.add(name) if bool((args[0] != 0).any()) else None

    handles = [module.register_forward_pre_hook(note(name)) for name, module in norms.items()]
    like = next(model.parameters())
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        with plain_evaluation(model), substituted(model, values):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return fed


def _of_norm(parameter: str, norms: Mapping[str, nn.Module]) -> bool:
    return parameter.rpartition(".")[0] in norms
