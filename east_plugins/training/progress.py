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

    The bar needs the extra `train`; without tqdm there are lines.
    """

    def __init__(
        self, trainer: Trainer, quiet: bool = False, on_epoch: Callable[[dict[str, Any]], object] | None = None
    ):
        self.trainer = trainer
        self.quiet = quiet
        self.on_epoch = on_epoch
        self.bar: Any = None
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
            self.handlers.append(logging.StreamHandler())
        for handler in self.handlers:
            package.addHandler(handler)
        for line in plan(trainer):
            self.say(line)
        if trainer.host.steps:
            self.say(f"goes on after step {trainer.host.steps:,} of {trainer.options.steps:,}")
        self.began, self.first_step, self.told = time.monotonic(), trainer.host.steps, False
        self.spoke = self.began
        if not self.quiet and sys.stderr.isatty() and (tqdm := _tqdm()):
            self.bar = tqdm(
                total=trainer.options.steps, initial=trainer.host.steps, smoothing=0.05, dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left{postfix}",
            )  # fmt: skip
            self._show()
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
            print(line, file=sys.stderr, flush=True)
            self.spoke = time.monotonic()
        if log:
            with contextlib.suppress(OSError):  # a full disk: the run itself says so
                self.log.write(line + "\n")

    def step(self) -> None:
        trainer, now = self.trainer, time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
            if trainer.host.steps % 20 == 0:
                self._show()
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
            self._show()
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

    def _show(self) -> None:
        """The bar's words, the most important ones first: a narrow terminal cuts the last ones off."""
        trainer, last = self.trainer, self.last
        assert self.bar is not None
        self.bar.set_description_str(f"epoch {min(trainer.epoch + 1, trainer.options.epochs)}/{trainer.options.epochs}")
        words = [] if last is None else [f"validation {last['validation_accuracy']:.1%}"]
        words.append(f"{trainer.host.nonzeros:,} active")
        if last is not None:
            words.append(f"{last['effective_density'] / last['density']:.0%} on a path")
        words.append(f"loss {trainer.totals.mean_loss:.3f}")
        if trainer.phased:
            words.append(f"DyReLU's beta {trainer.beta:.2f}")
        self.bar.set_postfix_str("  ".join(words))


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
        f"method    {options.label}: {updates}" + (f"; tricks: {', '.join(east)}" if east else ""),
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


def _tqdm():
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
