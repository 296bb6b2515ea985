"""The gradient of a batch of its own for the rules of a topology update (Nowak et al. 2023, Appendix G)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.substitute import spared_buffers

if TYPE_CHECKING:
    from .trainer import Trainer


def gradients(trainer: Trainer, count: int) -> dict[str, Tensor]:
    """Dense gradients of the mean loss of `count` training images, drawn anew for every step, by the weights' names.

    They are computed in parts of at most a batch, whose gradients are added up; running statistics are left as they
    were, and no gradient is left behind. Where there are fewer images, all of them are used.
    """
    options, host = trainer.options, trainer.host
    generator = torch.Generator().manual_seed(((options.seed + 1) * 1_000_003 + host.steps) % 2**63)
    count = left = min(count, len(trainer.data.train))
    trainer.optimizer.zero_grad()
    with spared_buffers(trainer.model):
        for x, y in trainer.data.train.batches(options.batch_size, generator, options.channels_last):
            x, y = x[:left], y[:left]
            with trainer.autocast():
                loss = F.cross_entropy(trainer.forward(x), y, reduction="sum") / count
            loss.backward()
            left -= len(y)
            if left <= 0:
                break
    found = host.take_gradients()
    trainer.optimizer.zero_grad()
    return found
