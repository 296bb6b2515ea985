"""A host inside Hugging Face's `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import UsageError
from ..host.masking import Masking
from .saving import save_with_optimizer


class SparseCallback(TrainerCallback):
    """Trains the model of a host sparsely.

        trainer = Trainer(model, args, train_dataset=images)
        mask = Masking.of("rigl+connected", model, trainer.create_optimizer(), density=0.001, steps=steps, ...)
        trainer.add_callback(SparseCallback(mask))
        trainer.train()

    The host is made before training, so that a checkpoint finds the network as it was. The trainer steps the
    optimizer, and the host follows every step. The host's state is in the trainer's checkpoints, with the optimizer's.

    Raises `UsageError` before training where the trainer steps another optimizer than the host's, or resumes from a
    checkpoint without the host's state.
    """

    def __init__(self, mask: Masking):
        self.mask = mask
        save_with_optimizer(mask)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "optimizer", optimizer) is not self.mask.optimizer:
            raise UsageError(
                "SparseCallback: the trainer steps another optimizer than the host's; "
                "make the host with trainer.create_optimizer(), or pass Trainer(optimizers=(optimizer, None))"
            )
        if state.global_step and not self.mask.steps:
            raise UsageError(
                "SparseCallback: the checkpoint has no optimizer state (was it saved with save_only_model?), "
                "so that its masks are not known"
            )
