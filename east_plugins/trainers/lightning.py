"""A host inside Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

try:
    from lightning.pytorch import Callback
except ImportError:  # the package's other name
    from pytorch_lightning import Callback  # type: ignore[assignment]

from ..errors import UsageError
from ..host.masking import Masking
from .saving import save_with_optimizer

Build = Callable[[Any, torch.optim.Optimizer, int], Masking]


class SparseCallback(Callback):
    """Trains a module sparsely: `Trainer(callbacks=[SparseCallback(build)])`.

        def build(module, optimizer, steps):
            shape = (3, 32, 32)
            return Masking.of("rigl+connected", module.net, optimizer, density=0.001, steps=steps, input_shape=shape)

    `build` is called once, when the module has its optimizer; `steps` are those of the whole run. Lightning steps the
    optimizer, and the host follows every step. Steps that mixed precision skips count for neither. The host's state
    is in Lightning's checkpoints, with the optimizer's.

    What changes the network's parameters (sharing, DyReLU) belongs into the module's `__init__` or `configure_model`:
    Lightning restores a checkpoint before there is an optimizer.

    Args:
        build: makes the host from the module, its (first) optimizer and the number of steps.

    Attributes:
        mask: the host; None before training begins.
    """

    def __init__(self, build: Build):
        self.build = build
        self.mask: Masking | None = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Make the host, or give it the optimizer of another `fit`. Raises `UsageError` where the run has no end."""
        optimizer = trainer.optimizers[0]
        if self.mask is not None:
            self.mask.optimizer = optimizer
        else:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UsageError("SparseCallback: the run has no end; give Trainer(max_steps=...) or max_epochs")
            restored = _values(module) if trainer.ckpt_path is not None else {}
            self.mask = self.build(module, optimizer, int(steps))
            _write(module, restored)  # by masks that are not known yet: they come with the optimizer's state
        save_with_optimizer(self.mask)


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _write(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    if values:
        module.load_state_dict(values)
