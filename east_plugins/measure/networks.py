"""Sparse networks to measure inference with: drawn, with random norms, for 3 x 32 x 32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from ..host.masking import Masking
from ..host.values import sparse_fan_in
from ..ops.maskable import maskable
from ..plugins.rate import Cosine
from ..plugins.transform.dct import convert
from ..training import models

SHAPE = (3, 32, 32)
STARTS = {"connected": "connected", "trained": "connected", "random": "ERK"}  # kind of masks to allocation
STEPS, FREQUENCY, BATCH = 24, 2, 8  # of training: a dozen topology updates


def draw(
    name: str, classes: int, density: float, masks: str = "connected", seed: int = 0, dctps: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network of `models.build`, in evaluation mode, and its masks.

    `masks` are drawn "connected" or at "random" with ERK's budgets; or they are "trained": connected ones that RigL's
    updates, on random images, have moved.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = models.build(name, classes)
    if dctps:
        convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    host = Masking(
        optimizer, growth_mode="gradient", death_rate_decay=Cosine(0.5, STEPS), update_frequency=FREQUENCY,
        seed=seed,
    )  # fmt: skip
    host.add_module(model, density, STARTS[masks], input_shape=SHAPE, weight_init="sparse-fan-in")
    randomise_norms(model, generator)
    if masks == "trained":
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(torch.randn(BATCH, *SHAPE)), torch.randint(classes, (BATCH,))).backward()
            host.step()
        randomise_norms(model, generator)
        sparse_fan_in(maskable(model), host.masks, generator)  # so few steps leave values of wild sizes
    return model.eval(), host.masks


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Scales, shifts and statistics as training could leave them; fresh ones make dead channels exactly zero."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
