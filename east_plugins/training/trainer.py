"""The built-in trainer: one run from a configuration to a run directory."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EastError, Interrupted, UsageError
from ..host import presets
from ..host.masking import Masking
from ..ops import files, memory
from ..ops.paths import effective_density, on_path
from ..options.config import Config, Resolved
from ..plugins import registry
from ..sparse import Engine
from . import runs
from .graphed import GraphedStep
from .images import Data, Images
from .interrupts import Interrupt, caught
from .progress import Progress

logger = logging.getLogger(__name__)

DEAD = (
    "no active weight lies on a path from input to output: the network computes a constant; try +connected after the "
    "method's name"
)
SAVE_EVERY = 30.0  #: seconds, at the least, between checkpoints at ends of epochs: a short epoch is not spent on them


def train(options: Config, out: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train one network and return its summary; everything is written to the directory `out`.

        train(Config(method="rigl+connected", model="resnet20", density=0.01, epochs=12), "runs/a")

    With `resume` an unfinished run in `out` goes on where it stopped, and a finished one is only read. Raises
    `UsageError` for what cannot be (before anything is written), where another process trains in `out`, and in a
    process of several (torchrun); `Interrupted` after saving on Ctrl-C, SIGTERM and SIGHUP; `EastError` where a file
    cannot be written, or where the loss is not finite and `on_nonfinite` says stop.
    """
    out = Path(out)
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(f"train runs in one process, and WORLD_SIZE is {ranks}: start it without torchrun")
    registry.trust(options.chosen().values())
    runs.check_folder(out)
    if (out / runs.CONFIG).exists() and not resume:
        raise UsageError(f"`out` {out} holds a run already; add `resume` to go on with it, or choose another folder")
    if resume and (summary := finished(options, out)):
        return summary
    if options.threads:
        torch.set_num_threads(options.threads)
    if runs.device(options.device).type == "cpu":
        memory.keep_freed()
    trainer = Trainer(options, out)
    runs.make_folder(out)
    with files.locked(out):
        if (out / runs.CONFIG).exists() and not resume:  # made meanwhile
            raise UsageError(f"`out` {out} holds a run already; choose another folder")
        if resume:
            trainer.restore()
        runs.write_config(out, trainer.options)
        with caught() as interrupt, Progress(trainer, quiet) as progress:
            while trainer.epoch < trainer.options.epochs:
                trainer.run_epoch(interrupt, progress)
            return trainer.finish()


def finished(options: Config, out: Path) -> dict[str, Any] | None:
    """The summary of the run in `out` where it has ended; raises `UsageError` where it is another run."""
    summary = runs.read_summary(out)
    if summary is not None:
        check_same(out, options.resolve(summary["steps"] // summary["epochs"]))
    return summary


def check_same(out: Path, options: Resolved) -> None:
    """Raises `UsageError`, naming a setting and both values, where the run in `out` is not that of the resolved
    `options`."""
    there = runs.read_config(out).resolve(options.steps_per_epoch)
    if difference := runs.difference(there, options):
        name, old, new = difference
        raise UsageError(f"`out` {out} holds another run: `{name}` is {old} in its {runs.CONFIG}, here it is {new}")


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


#: What every checkpoint has.
_STATE = ("model", "optimizer", "scheduler", "host", "engine", "beta", "best", "epoch", "step_in_epoch", "seconds",
          "totals", "epoch_generator", "rng")  # fmt: skip


class Trainer:
    """State of one run: everything that a checkpoint holds, and what is derived from the configuration."""

    def __init__(self, options: Config, out: Path, data: Data | None = None):
        self.out = out
        self.device = runs.device(options.device)
        self.data = (data or runs.load_data(options)).to(self.device)
        self.options: Resolved = options.resolve(self.data.train.steps(options.batch_size))
        options = self.options
        self.model = runs.build_model(options, self.data.num_classes, self.data.input_shape).to(self.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        shape = self.data.input_shape
        self.phased = presets.activations(options, self.model, shape) if options.east.dyrelu else None
        self.optimizer = _optimizer(options, self.model)
        milestones = [round(min(epoch, options.epochs) * options.steps_per_epoch) for epoch in options.lr_drops]
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.1)
        plugins = [] if self.phased is None else [self.phased]
        self.host = presets.hosted(Masking, options, self.model, self.optimizer, shape, plugins)
        self.host.reads_dense_gradients = options.clip_norm is not None and options.clip_norm_of != "active"
        self.engine = Engine(self.host, shape, "dense" if options.compile or options.cuda_graph else options.engine)
        self.forward = torch.compile(self.model) if options.compile else self.model
        self.graphed = self._graphed() if options.cuda_graph else None
        self.generator = torch.Generator().manual_seed(options.seed)
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
        self.generator.set_state(self.epoch_generator)
        batches = self.data.train.batches(options.batch_size, self.generator, options.channels_last)
        self.model.train()
        for index, (x, y) in enumerate(batches):
            if index < self.step_in_epoch:
                continue
            self._step(x, y)
            self.step_in_epoch += 1
            progress.step()
            if interrupt.pressed or self._save_is_due():
                self.seconds, began = self.seconds + time.monotonic() - began, time.monotonic()
                self.save()
            if interrupt.pressed:
                raise Interrupted(f"stopped in epoch {self.epoch + 1}; go on with --resume --out {self.out}")
        self.epoch_generator = self.generator.get_state()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        line = self._evaluate()
        self.seconds += time.monotonic() - began
        line["seconds"] = round(self.seconds, 2)
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

    def _save_is_due(self, epoch_ended: bool = False) -> bool:
        """Whether the time between two checkpoints has passed; without `save_every` they come at ends of epochs."""
        minutes = self.options.save_every
        if minutes is None:
            return epoch_ended and time.monotonic() - self.saved >= SAVE_EVERY
        return time.monotonic() - self.saved >= 60 * minutes

    def _step(self, x: Tensor, y: Tensor) -> None:
        if self.graphed is None:
            loss, correct = self._gradients(x, y)
        else:
            loss, correct = self.graphed(x, y, self.phased and self.phased.phase)
        if self.options.on_nonfinite == "stop" and not math.isfinite(float(loss)):
            raise EastError(
                f"epoch {self.epoch + 1}, step {self.step_in_epoch + 1}: the loss is {float(loss)}; the last "
                "checkpoint is from before; try a smaller `lr`, or `clip_norm`"
            )
        if self.options.clip_norm is not None:
            self.host.clip_grad_norm_(self.options.clip_norm, of=self.options.clip_norm_of or "all")
        self.host.step()
        self.scheduler.step()
        self.totals.add(loss, correct, len(y))

    def _graphed(self) -> GraphedStep:
        if self.device.type != "cuda":
            raise UsageError(f"`cuda_graph` needs a CUDA device, and `device` is {self.device}")
        return GraphedStep(self._gradients, self.model.parameters, self.device)

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, and how many of its images were classified right; makes the gradients."""
        self.optimizer.zero_grad()
        with self._autocast():
            output = self.forward(x)
            loss = F.cross_entropy(output, y)
        loss.backward()
        return loss.detach(), (output.argmax(1) == y).sum()

    def _evaluate(self) -> dict[str, Any]:
        """The epoch's line of `metrics.jsonl`; keeps the network where it is the best so far."""
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
        at_target = self.host.nonzeros == self.host.target_nonzeros(self.options.steps) and self.beta == 0
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
            with self._autocast():
                correct += (self.model(x).argmax(1) == y).sum()
        return correct.item() / max(1, len(images))

    def finish(self) -> dict[str, Any]:
        """Test the best network, once, and write the summary."""
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

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp)

    # ------------------------------------------------------------------ state

    def save(self) -> None:
        """Write the checkpoint: all that `restore` needs to go on bit for bit."""
        runs.save_checkpoint(
            self.out / runs.CHECKPOINT,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "host": self.host.state_dict(),
                "engine": self.engine.state_dict(),
                "beta": self.beta,
                "best": self.best,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "epoch_generator": self.epoch_generator,
                "totals": {name: float(value) for name, value in vars(self.totals).items()},
                "seconds": self.seconds,
                "diverged": self.diverged,
                "data": self.data_crc,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Take up the checkpoint in `out`; without one the run begins anew. Raises `UsageError` where it is another
        run's."""
        there = [self.out / name for name in (runs.CHECKPOINT, runs.PREVIOUS) if (self.out / name).exists()]
        if not there:
            _cut_metrics(self.out / runs.METRICS, 0)
            return
        check_same(self.out, self.options)
        for path in there:
            try:
                with _of_this_run(path):
                    state = self._checked(runs.load_checkpoint(path, self.device), path)
                break
            except UsageError as error:
                if path == there[-1]:
                    raise
                logger.warning("%s; going on from the one before it, %s", error, runs.PREVIOUS)
        with _of_this_run(path):
            self._take_up(state)
        lines = _cut_metrics(self.out / runs.METRICS, self.epoch)
        if lines < self.epoch:
            logger.warning("%s has lost %d of %d lines", self.out / runs.METRICS, self.epoch - lines, self.epoch)

    def _checked(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """The state as it is; raises `UsageError` where it cannot be one of this run."""
        if missing := [name for name in _STATE if name not in state]:
            raise UsageError(f"{path} is no checkpoint of a run: it has no {missing[0]}")
        epoch, step = state["epoch"], state["step_in_epoch"]
        most = self.options.epochs, self.options.steps_per_epoch
        if not (type(epoch) is type(step) is int and 0 <= epoch <= most[0] and 0 <= step <= most[1]):
            raise UsageError(f"{path} is damaged: epoch {epoch}, step {step} of a run of {most[0]} times {most[1]}")
        if state.get("data", crc := self.data_crc) != crc:
            raise UsageError(f"{path} is of other training images than those that are there now")
        diverged = state.get("diverged") or not math.isfinite(state["totals"]["loss"])
        if not diverged and any(not bool(value.isfinite().all()) for value in state["model"].values()):
            raise UsageError(f"{path} is damaged: it has weights that are not finite, and the loss was")
        return state

    @functools.cached_property
    def data_crc(self) -> int:
        """A checksum of the training images, or of their files' names, and of their labels."""
        train = self.data.train
        content = train.images.cpu().numpy().tobytes() if isinstance(train, Images) else "\n".join(train.paths).encode()
        return zlib.crc32(content, zlib.crc32(train.labels.cpu().numpy().tobytes()))

    def _take_up(self, state: dict[str, Any]) -> None:
        if self.phased and state["beta"] == 0:
            self.phased.remove(self.optimizer)
        for name in ("model", "optimizer", "scheduler", "host", "engine"):
            getattr(self, name).load_state_dict(state[name])
        if self.phased:
            self.phased.set_beta(state["beta"])
        for name in ("best", "epoch", "step_in_epoch", "seconds"):
            setattr(self, name, state[name])
        self.totals = Totals(**state["totals"])
        self.diverged = state.get("diverged", False)
        self.epoch_generator = state["epoch_generator"].cpu()
        self.generator.set_state(self.epoch_generator)
        torch.set_rng_state(state["rng"].cpu())
        cuda_rng = state.get("cuda_rng")
        if self.device.type == "cuda" and cuda_rng is not None:  # a run may go on on another device
            torch.cuda.set_rng_state(cuda_rng.cpu(), self.device)


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


def _optimizer(options: Resolved, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    fused = True if parameters[0].is_cuda else None  # None: PyTorch's choice
    shared: dict[str, Any] = dict(lr=options.lr, weight_decay=options.weight_decay, fused=fused)
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=options.momentum, nesterov=options.nesterov, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer](parameters, **shared)


def _peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, MiB: the accelerator's, or on the CPU the whole process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource  # not on every platform

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)
