"""How a run tells what it is doing: a progress bar or a line an epoch, and TensorBoard."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import Trainer


class Progress:
    """A bar over all steps on a terminal, else a line an epoch on standard error; scalars for TensorBoard.

    Both need the extra `train`; without tqdm there are lines, without tensorboard no event files.
    """

    def __init__(self, trainer: Trainer, quiet: bool = False):
        self.trainer = trainer
        self.quiet = quiet
        self.bar = self.writer = None

    def __enter__(self) -> Progress:
        trainer = self.trainer
        self.writer = _summary_writer(trainer.out, trainer.epoch + 1)
        if not self.quiet and sys.stderr.isatty() and (tqdm := _tqdm()):
            self.bar = tqdm(
                total=trainer.options.steps, initial=trainer.host.steps, unit="step", desc=trainer.options.label,
                smoothing=0.05, dynamic_ncols=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update(1)
            if self.trainer.host.steps % 20 == 0:
                self.bar.set_postfix_str(self._state())

    def epoch(self, line: dict[str, Any]) -> None:
        """Report one line of `metrics.jsonl`."""
        if self.writer is not None:
            for name, value in line.items():
                if isinstance(value, dict):  # of the layers
                    continue
                self.writer.add_scalar(name, math.nan if value is None else value, line["epoch"])
        if self.bar is None and not self.quiet:
            options = self.trainer.options
            loss = math.nan if line["loss"] is None else line["loss"]
            left = line["seconds"] / line["epoch"] * (options.epochs - line["epoch"])
            print(
                f"epoch {line['epoch']:>{len(str(options.epochs))}}/{options.epochs}  loss {loss:.4f}  "
                f"train {line['train_accuracy']:.2%}  validation {line['validation_accuracy']:.2%}  "
                f"density {line['density']:.6f}  effective {line['effective_density']:.6f}  beta {line['beta']:.2f}  "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _state(self) -> str:
        trainer = self.trainer
        totals = trainer.totals
        return (
            f"loss {totals.mean_loss:.3f} acc {totals.accuracy:.1%} density {trainer.density:.5f} "
            f"beta {trainer.beta:.2f}"
        )


def _tqdm():
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _summary_writer(folder, epoch: int):
    """A writer whose scalars from `epoch` on stand in place of those that a killed run has left there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=epoch)
