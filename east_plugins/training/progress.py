"""How a run tells what it is doing: what it will do, a bar or lines, `log.txt`, and loggers."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..ops.paths import effective_density
from .bar import Bar
from .loggers import Loggers

if TYPE_CHECKING:
    from .trainer import Trainer

LOG = "log.txt"
FIRST_STEPS, FIRST_SECONDS = 10, 3.0  #: what the first estimate of the time left is made from, whichever is later
SILENCE = 15.0  #: seconds at the most without a line where there is no bar


class Progress:
    """What a run will do in five lines, then a bar over all steps on a terminal or lines on standard error; the lines,
    and what is logged, in `log.txt`, too; the figures of every epoch for loggers, and for
    `on_epoch`, a function of their line.
    """

    def __init__(
        self, trainer: Trainer, quiet: bool = False, on_epoch: Callable[[dict[str, Any]], object] | None = None
    ):
        self.trainer = trainer
        self.quiet = quiet
        self.on_epoch = on_epoch
        self.bar: Bar | None = None
        self.log: Any = None
        self.handlers: list[logging.Handler] = []
        self.last: dict[str, Any] | None = None  # line of metrics.jsonl

    def __enter__(self) -> Progress:
        trainer = self.trainer
        self.loggers = Loggers(trainer.options, trainer.out, trainer.epoch)
        self.log = open(trainer.out / LOG, "a", buffering=1)
        package = logging.getLogger("east_plugins")
        self.handlers = [logging.StreamHandler(self.log)]
        if not (self.quiet or package.hasHandlers()):  # then Python prints warnings, until there is a handler
            self.handlers.append(_OverTheBar(self))
        for handler in self.handlers:
            package.addHandler(handler)
        for line in plan(trainer):
            self.say(line)
        if trainer.host.steps:
            self.say(f"goes on after step {trainer.host.steps:,} of {trainer.options.steps:,}")
        self.began, self.first_step, self.told = time.monotonic(), trainer.host.steps, False
        self.spoke = self.began
        if not self.quiet and sys.stderr.isatty():
            self.bar = Bar(sys.stderr)
            self._show(self.bar)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        self.loggers.close()
        for handler in self.handlers:
            logging.getLogger("east_plugins").removeHandler(handler)
        with contextlib.suppress(OSError):
            self.log.close()

    def say(self, line: str, log: bool = True) -> None:
        """One line, on standard error and in `log.txt`."""
        if not self.quiet:
            if self.bar is not None:
                self.bar.clear()
            print(line, file=sys.stderr, flush=True)
            self.spoke = time.monotonic()
        if log:
            with contextlib.suppress(OSError):  # a full disk: the run itself says so
                self.log.write(line + "\n")

    def step(self) -> None:
        trainer, now = self.trainer, time.monotonic()
        if self.bar is not None:
            if self.bar.due:
                self._show(self.bar)
            return
        done = trainer.host.steps - self.first_step
        if not self.told and done >= FIRST_STEPS and now - self.began >= FIRST_SECONDS:
            self.told = True
            self.say(f"about {self._left()} by the first {done} steps")
        elif not self.quiet and now - self.spoke > SILENCE:
            options, totals = trainer.options, trainer.totals
            self.say(
                f"epoch {trainer.epoch + 1}/{options.epochs}  step {trainer.step_in_epoch}/{options.steps_per_epoch}  "
                f"loss {totals.mean_loss:.4f}  train {totals.accuracy:.2%}  {self._left()} left", log=False,
            )  # fmt: skip

    def epoch(self, line: dict[str, Any]) -> None:
        """Report one line of `metrics.jsonl`."""
        self.last, self.told = line, True
        self.loggers.epoch(line)
        if self.on_epoch is not None:
            self.on_epoch(line)
        if self.bar is not None:
            self._show(self.bar)
        options = self.trainer.options
        loss = math.nan if line["loss"] is None else line["loss"]
        text = (
            f"epoch {line['epoch']:>{len(str(options.epochs))}}/{options.epochs}  loss {loss:.4f}  "
            f"train {line['train_accuracy']:.2%}  validation {line['validation_accuracy']:.2%}  "
            f"density {line['density']:.6f}  effective {line['effective_density']:.6f}  beta {line['beta']:.2f}  "
            f"{self._left()} left"
        )
        if self.bar is None:
            self.say(text)
        else:
            with contextlib.suppress(OSError):
                self.log.write(text + "\n")

    def _left(self) -> str:
        """The time left, as the steps of this process went."""
        trainer = self.trainer
        done = max(1, trainer.host.steps - self.first_step)
        return duration((time.monotonic() - self.began) / done * (trainer.options.steps - trainer.host.steps))

    def _show(self, bar: Bar) -> None:
        bar.show(self._forms(), self.trainer.host.steps / self.trainer.options.steps)

    def _forms(self) -> list[str]:
        """How far the run is, in many words, and in few for a narrow terminal."""
        trainer, options, last = self.trainer, self.trainer.options, self.last
        epoch, steps = f"{min(trainer.epoch + 1, options.epochs)}/{options.epochs}", trainer.host.steps
        left = f"{self._left()} left" if steps > self.first_step else ""
        active = f"{trainer.host.nonzeros:,} active"
        accuracy = f"{last['validation_accuracy']:.1%}" if last else ""
        live = f"{last['effective_density'] / last['density']:.0%} on a path" if last else ""
        loss = trainer.totals.mean_loss if trainer.totals.images else last and last["loss"]
        lost = "" if loss is None else f"loss {loss:.3f}"
        beta = f"beta {trainer.beta:.2f}" if trainer.phased else ""
        val = accuracy and f"val {accuracy}"
        wide = [f"epoch {epoch}", f"{steps / options.steps:.0%}", left, accuracy and f"validation {accuracy}", active,
                live, lost, beta and f"DyReLU's {beta}"]  # fmt: skip
        narrow = [epoch, left.removesuffix(" left"), val, active, live.replace(" a ", " "), beta]
        forms = [("  ", wide), ("  ", [f"epoch {epoch}", left, val, active, live, beta]), (" ", narrow)]
        return [between.join(filter(None, words)) for between, words in forms]


class _OverTheBar(logging.StreamHandler):
    """Lines of standard error, in place of a bar that stands there."""

    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        if self.progress.bar is not None:
            self.progress.bar.clear()
        super().emit(record)


def plan(trainer: Trainer) -> list[str]:
    """What a run will do, in five lines."""
    options, host, data = trainer.options, trainer.host, trainer.data
    size = host.theoretical_size
    live = round(effective_density(trainer.model, host.masks, data.input_shape) * size)
    drops = [f"{epoch:g}" for epoch in options.lr_drops if epoch < options.epochs]
    rate = f", a tenth of it after {' and '.join(drops)}" if drops else ""
    updates = "no topology updates" if options.static else f"a topology update every {options.update_frequency} steps"
    east = [name for name in ("cyclic", "dyrelu", "share") if getattr(options.east, name)]
    stops = f", of which the first {n} alone are run" if (n := options.limit_steps) else ""
    scaled = f"; what the file counts was for {n} epochs, and is scaled" if (n := options.origins.scaled_from) else ""
    shape = "x".join(map(str, data.input_shape))
    threads = torch.get_num_threads()
    return [
        f"network   {options.model} with {size:,} maskable weights, {host.nonzeros:,} of them active "
        f"({100 * (1 - host.nonzeros / size):.6g} % zero), {live:,} on a path",
        f"method    {options.label} by recipe {options.recipe}: {updates}"
        + (f"; tricks: {', '.join(east)}" if east else ""),
        f"data      {options.data}: {len(data.train):,} images for training, {len(data.validation):,} for validation, "
        f"{len(data.test):,} for the test; {shape}, {data.num_classes} classes",
        f"schedule  {options.epochs} epochs of {options.steps_per_epoch} steps{stops}, {options.batch_size} images a "
        f"step; {options.optimizer}, rate {options.lr:g}{rate}{scaled}",
        f"engine    {options.engine} on {trainer.device}, {threads} thread{'s' * (threads > 1)}; the run's folder is "
        f"{trainer.out}",
    ]


def duration(seconds: float) -> str:
    """A time in the words people use: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
