"""The built-in trainer: one run from a configuration to a run directory."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EastError, Interrupted, UsageError
from ..host import presets
from ..host.masking import Masking
from ..ops import files, memory
from ..ops.doing import doing
from ..ops.paths import effective_density, on_path
from ..options.config import Config, Resolved
from ..plugins import registry
from ..sparse import Engine
from . import loggers, runs, state, update_batch
from .graphed import GraphedStep
from .images import Batches, Data, Images, Kept
from .interrupts import Interrupt, caught
from .progress import Progress
from .signals import Signals
from .starts import begin_from
from .state import Totals

logger = logging.getLogger(__name__)

DEAD = (
    "no active weight lies on a path from input to output: the network computes a constant; try +connected after the "
    "method's name"
)
SAVE_EVERY = 30.0  #: seconds, at the least, between checkpoints at ends of epochs: a short epoch is not spent on them


def train(
    options: Config,
    out: str | Path,
    resume: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Train one network and return its summary; everything is written to the directory `out`.

        train(Config(method="rigl+connected", model="resnet20", density=0.01, epochs=12), "runs/a")

    With `limit_steps` in `options` the run stops there, unfinished, and what is returned says so (`unfinished`).
    `on_epoch` is called after every epoch with its line of `metrics.jsonl`, for loggers of one's own. `kept`, a
    dictionary, empty at first, keeps the images in memory for the next call with the same data.
    With `resume` an unfinished run in `out` goes on where it stopped, and a finished one is only read. Raises
    `UsageError` for what cannot be (before anything is written), where another process trains in `out`, and in a
    process of several (torchrun); `Interrupted` after saving on Ctrl-C, SIGTERM and SIGHUP; `EastError` where a file
    cannot be written, or where the loss is not finite and `on_nonfinite` says stop.
    """
    out = Path(out)
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(f"train runs in one process, and WORLD_SIZE is {ranks}: start it without torchrun")
    registry.trust(options.chosen().values())
    loggers.check(options.loggers)
    runs.check_folder(out)
    if (out / runs.CONFIG).exists() and not resume:
        raise UsageError(f"`out` {out} holds a run already; add `resume` to go on with it, or choose another folder")
    if resume and (summary := runs.finished(options, out)):
        return summary
    if options.threads:
        torch.set_num_threads(options.threads)
    if runs.device(options.device).type == "cpu":
        memory.keep_freed()
    with options.origins.told():
        trainer = Trainer(options, out, runs.load_data(options, kept))
    runs.make_folder(out)
    with files.locked(out):
        if (out / runs.CONFIG).exists() and not resume:  # made meanwhile
            raise UsageError(f"`out` {out} holds a run already; choose another folder")
        if resume:
            trainer.restore()
        runs.write_config(out, trainer.options)
        runs.write_data(out, trainer.options, trainer.data)
        if trainer.epoch == trainer.step_in_epoch == 0:
            trainer.keep_weights()
        with caught() as interrupt, Progress(trainer, quiet, on_epoch) as progress:
            while trainer.epoch < trainer.options.epochs:
                if trainer.at_limit:
                    return trainer.unfinished()
                trainer.run_epoch(interrupt, progress)
            summary = trainer.finish()
            progress.loggers.summary(summary)
            return summary


class Trainer:
    """State of one run: everything that a checkpoint holds, and what is derived from the configuration."""

    def __init__(self, options: Config, out: Path, data: Data | None = None):
        self.out = out
        self.device = runs.device(options.device)
        self.data = (data or runs.load_data(options)).to(self.device)
        self.options: Resolved = options.resolve(self.data.train.steps(options.batch_size))
        options = self.options
        doing(f"making {options.model} and its masks")
        self.model = runs.build_model(options, self.data.num_classes, self.data.input_shape).to(self.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if options.start is not None:
            begin_from(self.model, options.start)
        shape = self.data.input_shape
        self.phased = presets.activations(options, self.model, shape) if options.east.dyrelu else None
        self.optimizer = _optimizer(options, self.model)
        self.scheduler = _schedule(options, self.optimizer)
        plugins = [] if self.phased is None else [self.phased]
        batches = Batches(self.data.train, options.batch_size, options.seed, options.channels_last)
        self.host = presets.hosted(Masking, options, self.model, self.optimizer, shape, plugins, batches)
        self.host.reads_dense_gradients = options.clip_norm is not None and options.clip_norm_of != "active"
        self.engine = Engine(self.host, shape, "dense" if options.compile or options.cuda_graph else options.engine)
        self.forward = torch.compile(self.model) if options.compile else self.model
        self.graphed = self._graphed() if options.cuda_graph else None
        order = options.seed if options.order_seed is None else options.order_seed
        self.generator = torch.Generator().manual_seed(order)
        self.signals = Signals(self.data)
        self.epoch, self.step_in_epoch = 0, 0
        self.epoch_generator = self.generator.get_state()
        self.totals = Totals()
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0
        self.saved = time.monotonic()
        self.diverged = False  # whether an epoch's loss was not finite
        self.dead = False  # whether no weight lies on a path

    # ------------------------------------------------------------------ training

    def run_epoch(self, interrupt: Interrupt, progress: Progress) -> None:
        """One epoch, or what is left of it after `restore`; evaluates and logs at its end, and saves where the last
        checkpoint is old or the run is over."""
        options, began = self.options, time.monotonic()
        doing(f"epoch {self.epoch + 1} of {options.epochs}")
        self.generator.set_state(self.epoch_generator)
        batches = self.data.train.batches(options.batch_size, self.generator, options.channels_last)
        self.model.train()
        for index, (x, y) in enumerate(batches):
            if index < self.step_in_epoch:
                continue
            self._step(x, y)
            self.step_in_epoch += 1
            progress.step()
            if interrupt.pressed or self.at_limit or self._save_is_due():
                self.seconds, began = self.seconds + time.monotonic() - began, time.monotonic()
                self.save()
            if interrupt.pressed:
                raise Interrupted(f"stopped in epoch {self.epoch + 1}; go on with --resume --out {self.out}")
            if self.at_limit:
                return
        self.epoch_generator = self.generator.get_state()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        line = self._evaluate()
        self.seconds += time.monotonic() - began
        line["seconds"] = round(self.seconds, 2)
        self.keep_weights()
        self.totals = Totals()
        if not math.isfinite(line["loss"]):
            line["loss"] = None  # JSON has no NaN
            if not self.diverged:
                logger.warning("epoch %d: loss is not finite; try a smaller `lr`, or `clip_norm`", self.epoch)
            self.diverged = True
        if line["effective_density"] == 0 and not self.dead:
            logger.warning("epoch %d: %s", self.epoch, DEAD)
        self.dead = line["effective_density"] == 0
        with open(self.out / runs.METRICS, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.epoch == options.epochs or self._save_is_due(epoch_ended=True):
            self.save()
        progress.epoch(line)

    def keep_weights(self) -> None:
        """Write the weights as they are to a file of their own, where that is asked for at the end of this epoch."""
        if self.epoch in (self.options.keep_weights or ()):
            files.save_checkpoint(self.out / runs.weights_of(self.epoch), self.model.state_dict())

    def updates(self) -> Iterator[int]:
        """Train, and stop at every topology update: yields the step that has it, from 1, where gradients are what its
        rules see; it is made when the next one is asked for. Nothing is evaluated or written. Raises `UsageError` where
        the run has none."""
        self.model.train()
        found = False
        for _ in range(self.options.epochs):
            for x, y in self.data.train.batches(self.options.batch_size, self.generator, self.options.channels_last):
                loss, correct = self._backward(x, y)
                if self.host.update_due:
                    found = True
                    yield self.host.steps + 1
                self._advance(loss, correct, len(y))
        if not found:
            raise UsageError(f"a run of {self.options.steps} steps has no topology update")

    def _save_is_due(self, epoch_ended: bool = False) -> bool:
        """Whether the time between two checkpoints has passed; without `save_every` they come at ends of epochs."""
        minutes = self.options.save_every
        if minutes is None:
            return epoch_ended and time.monotonic() - self.saved >= SAVE_EVERY
        return time.monotonic() - self.saved >= 60 * minutes

    def _step(self, x: Tensor, y: Tensor) -> None:
        self._advance(*self._backward(x, y), len(y))

    def _backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and right answers of a batch; leaves the gradients of this step, and those that an update is to see."""
        if self.options.update_batch is not None and self.host.dense_gradient_due:
            self.host.offer_gradients(update_batch.gradients(self, self.options.update_batch))
        if self.graphed is None:
            return self._gradients(x, y)
        loss, correct = self.graphed(x, y, self.phased and self.phased.phase)
        return loss, correct

    def _advance(self, loss: Tensor, correct: Tensor, count: int) -> None:
        if self.options.on_nonfinite == "stop" and not math.isfinite(float(loss)):
            raise EastError(
                f"epoch {self.epoch + 1}, step {self.step_in_epoch + 1}: the loss is {float(loss)}; the last "
                "checkpoint is from before; try a smaller `lr`, or `clip_norm`"
            )
        if self.options.clip_norm is not None:
            self.host.clip_grad_norm_(self.options.clip_norm, of=self.options.clip_norm_of or "all")
        self.host.step()
        self.scheduler.step()
        self.totals.add(loss, correct, count)

    def _graphed(self) -> GraphedStep:
        if self.device.type != "cuda":
            raise UsageError(f"`cuda_graph` needs a CUDA device, and `device` is {self.device}")
        return GraphedStep(self._gradients, self.model.parameters, self.device)

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, and how many of its images were classified right; makes the gradients."""
        self.optimizer.zero_grad()
        with self.autocast():
            output = self.forward(x)
            loss = F.cross_entropy(output, y)
        loss.backward()
        return loss.detach(), (output.argmax(1) == y).sum()

    def _evaluate(self) -> dict[str, Any]:
        """The epoch's line of `metrics.jsonl`; keeps the network where it is the best so far."""
        doing(f"the validation images after epoch {self.epoch}")
        live = on_path(self.model, self.host.masks, self.data.input_shape)
        layers = {name: [int(mask.sum()), int(live[name].sum())] for name, mask in self.host.masks.items()}
        line = {
            "epoch": self.epoch,
            "loss": self.totals.mean_loss,
            "train_accuracy": self.totals.accuracy,
            "validation_accuracy": self.accuracy(self.data.validation),
            "density": self.density,
            "nonzeros": self.host.nonzeros,
            "effective_density": sum(on for _, on in layers.values()) / self.host.theoretical_size,
            "beta": self.beta,
            "lr": self.scheduler.get_last_lr()[0],
            "death_rate": self.host.death_rate,
            "itop_rate": self.host.fired_masks_update()[1],
            "layers": layers,  # active weights, and those of them on a path
        }
        if self.options.signals and self.signals.due(self.seconds):
            line |= self.signals.measured(self.model, self.host.masks)
        at_target = self.host.is_at(self.options.steps) and self.beta == 0
        last = self.options.tested == "last"
        if at_target and (self.best is None or last or line["validation_accuracy"] >= self.best["validation_accuracy"]):
            self.best = {
                "epoch": self.epoch,
                "validation_accuracy": line["validation_accuracy"],
                "model": copy.deepcopy(self.model.state_dict()),
                "masks": copy.deepcopy(self.host.masks),
            }
        return line

    @torch.no_grad()
    def accuracy(self, images) -> float:
        """Share of images classified right, in evaluation mode; 0 for an empty set."""
        self.model.eval()
        correct = torch.zeros((), dtype=torch.long, device=self.device)
        for x, y in images.batches(1000 if images.shape[-1] <= 64 else self.options.batch_size):
            with self.autocast():
                correct += (self.model(x).argmax(1) == y).sum()
        return correct.item() / max(1, len(images))

    @property
    def at_limit(self) -> bool:
        """Whether the run is to stop here, unfinished."""
        limit = self.options.limit_steps
        return limit is not None and limit <= self.host.steps < self.options.steps

    def unfinished(self) -> dict[str, Any]:
        """What is known of a run that stops at `limit_steps`; nothing was tested, and no summary is written."""
        return {
            "unfinished": True,
            "method": self.options.label,
            "steps": self.host.steps,
            "steps_in_all": self.options.steps,
            "loss": self.totals.mean_loss,
            "nonzeros": self.host.nonzeros,
            "maskable": self.host.theoretical_size,
            "classes": self.data.num_classes,
            "seconds": round(self.seconds, 2),
        }

    def finish(self) -> dict[str, Any]:
        """Test the best network, once, and write the summary."""
        doing("the test images")
        best = self.best
        assert best is not None  # the last epoch is at the target density, after the phase-out
        self.model.load_state_dict(best["model"])
        masks = best["masks"]
        self.host.load_state_dict({**self.host.state_dict(), "masks": masks})
        nonzeros = sum(int(mask.sum()) for mask in masks.values())
        summary = {
            "method": self.options.label,
            "model": self.options.model,
            "data": self.options.data,
            "input_shape": list(self.data.input_shape),
            "classes": self.data.num_classes,
            "density": nonzeros / self.host.theoretical_size,
            "nonzeros": nonzeros,
            "maskable": self.host.theoretical_size,
            "effective_density": effective_density(self.model, masks, self.data.input_shape),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "test_accuracy": self.accuracy(self.data.test),
            "best_validation_accuracy": best["validation_accuracy"],
            "best_epoch": best["epoch"],
            "itop_rate": self.host.fired_masks_update()[1],
            "steps": self.host.steps,
            "epochs": self.epoch,
            "diverged": self.diverged,
            "seconds": round(self.seconds, 2),
            "peak_memory_mib": _peak_memory(self.device),
            "seed": self.options.seed,
            "weights_sha256": runs.digest({**best["model"], **{f"mask {n}": m for n, m in masks.items()}}),
        }
        runs.write_atomically(self.out / runs.SUMMARY, json.dumps(summary, indent=1) + "\n")
        return summary

    @property
    def density(self) -> float:
        return self.host.nonzeros / self.host.theoretical_size

    @property
    def beta(self) -> float:
        return self.phased.beta if self.phased else 0.0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp)

    def save(self) -> None:
        """Write the checkpoint: all that `restore` needs to go on bit for bit."""
        state.save(self)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Take up the checkpoint in `out`; see `state.restore`."""
        state.restore(self)

    @functools.cached_property
    def data_crc(self) -> int:
        """A checksum of the training images, or of their files' names, and of their labels."""
        train = self.data.train
        content = train.images.cpu().numpy().tobytes() if isinstance(train, Images) else "\n".join(train.paths).encode()
        return zlib.crc32(content, zlib.crc32(train.labels.cpu().numpy().tobytes()))


def _optimizer(options: Resolved, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    fused = True if parameters[0].is_cuda else None  # None: PyTorch's choice
    shared: dict[str, Any] = dict(lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=options.momentum, nesterov=options.nesterov, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer](parameters, **shared)


def _schedule(options: Resolved, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Tenfold drops, after a linear rise from a tenth of the rate over the warm-up."""
    milestones = [round(min(epoch, options.epochs) * options.steps_per_epoch) for epoch in options.lr_drops]
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    steps = round(options.warmup * options.steps_per_epoch)
    if not steps:
        return drops
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps)
    return torch.optim.lr_scheduler.ChainedScheduler([rise, drops])


def _peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, MiB: the accelerator's, or on the CPU the whole process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource  # not on every platform

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)
