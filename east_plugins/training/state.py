"""The state of a run: what its checkpoint holds, and how a run takes it up and goes on bit for bit."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import runs

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)

#: What every checkpoint has.
FIELDS = ("model", "optimizer", "scheduler", "host", "engine", "beta", "best", "epoch", "step_in_epoch", "seconds",
          "totals", "epoch_generator", "rng")  # fmt: skip


@dataclass
class Totals:
    """Sums over the images of an epoch so far; tensors stay on their device until they are read."""

    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    images: float = 0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """A batch of `images` with its mean loss, and how many of them were classified right."""
        self.loss = self.loss + loss * images
        self.correct = self.correct + correct
        self.images += images

    @property
    def mean_loss(self) -> float:
        return float(self.loss) / max(1, self.images)

    @property
    def accuracy(self) -> float:
        return float(self.correct) / max(1, self.images)


def save(trainer: Trainer) -> None:
    """Write the checkpoint of a run: all that `restore` needs to go on bit for bit."""
    cuda = trainer.device.type == "cuda"
    runs.save_checkpoint(
        trainer.out / runs.CHECKPOINT,
        {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "host": trainer.host.state_dict(),
            "engine": trainer.engine.state_dict(),
            "beta": trainer.beta,
            "best": trainer.best,
            "epoch": trainer.epoch,
            "step_in_epoch": trainer.step_in_epoch,
            "epoch_generator": trainer.epoch_generator,
            "totals": {name: float(value) for name, value in vars(trainer.totals).items()},
            "seconds": trainer.seconds,
            "diverged": trainer.diverged,
            "data": trainer.data_crc,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(trainer.device) if cuda else None,
        },
    )


def restore(trainer: Trainer) -> None:
    """Take up the last checkpoint of a run that is whole; without one the run begins anew. Raises `UsageError` where it
    is another run's."""
    out = trainer.out
    there = [out / name for name in (runs.CHECKPOINT, runs.PREVIOUS) if (out / name).exists()]
    if not there:
        _cut_metrics(out / runs.METRICS, 0)
        return
    runs.check_same(out, trainer.options)
    for path in there:
        try:
            with _of_this_run(path):
                state = _checked(trainer, runs.load_checkpoint(path, trainer.device), path)
            break
        except UsageError as error:
            if path == there[-1]:
                raise
            logger.warning("%s; going on from the one before it, %s", error, runs.PREVIOUS)
    with _of_this_run(path):
        _take_up(trainer, state)
    lines = _cut_metrics(out / runs.METRICS, trainer.epoch)
    if lines < trainer.epoch:
        logger.warning("%s has lost %d of %d lines", out / runs.METRICS, trainer.epoch - lines, trainer.epoch)


def _checked(trainer: Trainer, state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state as it is; raises `UsageError` where it cannot be one of this run."""
    if missing := [name for name in FIELDS if name not in state]:
        raise UsageError(f"{path} is no checkpoint of a run: it has no {missing[0]}")
    epoch, step = state["epoch"], state["step_in_epoch"]
    most = trainer.options.epochs, trainer.options.steps_per_epoch
    if not (type(epoch) is type(step) is int and 0 <= epoch <= most[0] and 0 <= step <= most[1]):
        raise UsageError(f"{path} is damaged: epoch {epoch}, step {step} of a run of {most[0]} times {most[1]}")
    if state.get("data", crc := trainer.data_crc) != crc:
        raise UsageError(f"{path} is of other training images than those that are there now")
    diverged = state.get("diverged") or not math.isfinite(state["totals"]["loss"])
    if not diverged and any(not bool(value.isfinite().all()) for value in state["model"].values()):
        raise UsageError(f"{path} is damaged: it has weights that are not finite, and the loss was")
    return state


def _take_up(trainer: Trainer, state: dict[str, Any]) -> None:
    if trainer.phased and state["beta"] == 0:
        trainer.phased.remove(trainer.optimizer)
    for name in ("model", "optimizer", "scheduler", "host", "engine"):
        getattr(trainer, name).load_state_dict(state[name])
    if trainer.phased:
        trainer.phased.set_beta(state["beta"])
    for name in ("best", "epoch", "step_in_epoch", "seconds"):
        setattr(trainer, name, state[name])
    trainer.totals = Totals(**state["totals"])
    trainer.diverged = state.get("diverged", False)
    trainer.epoch_generator = state["epoch_generator"].cpu()
    trainer.generator.set_state(trainer.epoch_generator)
    torch.set_rng_state(state["rng"].cpu())
    cuda_rng = state.get("cuda_rng")
    if trainer.device.type == "cuda" and cuda_rng is not None:  # a run may go on on another device
        torch.cuda.set_rng_state(cuda_rng.cpu(), trainer.device)


@contextlib.contextmanager
def _of_this_run(path: Path) -> Iterator[None]:
    """What the content of a checkpoint that does not fit leads to is one `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{path} is no checkpoint of this run: {reason}") from error


def _cut_metrics(path: Path, epochs: int) -> int:
    """Drop lines of epochs that the checkpoint does not know; returns how many are left."""
    lines = path.read_text().splitlines()[:epochs] if path.exists() else []
    if path.exists():
        runs.write_atomically(path, "".join(line + "\n" for line in lines))
    return len(lines)
