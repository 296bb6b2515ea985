"""Decay of the prune rate over training.

Each is a frozen dataclass called with the step: `rate(step)` in [0, 1], constant past its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError
from .protocols import option
from .registry import rate as registry


@dataclass(frozen=True)
class RateDecay:
    """`initial` at step 0, `final`, or `initial` where that is lower, from step `steps` on: a rate of 0 stays 0.

    Raises `UsageError` for a rate outside [0, 1].
    """

    initial: float
    steps: int
    final: float = option(0.005, "rate at the end of the run", type=float)

    def __post_init__(self):
        for value in (self.initial, self.final):
            if not 0 <= value <= 1:
                raise UsageError(f"`death_rate` must be in [0, 1], got {value}")
        if self.steps < 1:
            raise UsageError(f"the prune rate needs at least 1 step to decay over, got {self.steps}")
        object.__setattr__(self, "final", min(self.final, self.initial))

    def fraction(self, step: int) -> float:
        """Part of the decay that is over, in [0, 1]."""
        return min(max(step / self.steps, 0.0), 1.0)


@registry.register("cosine")
class Cosine(RateDecay):
    """Half a cosine from the first rate to the last (RigL, Evci et al. 2020); stays there past its end."""

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * self.fraction(step))) / 2


@registry.register("linear")
class Linear(RateDecay):
    """A straight line from the first rate to the last; stays there past its end."""

    def __call__(self, step: int) -> float:
        return self.initial + (self.final - self.initial) * self.fraction(step)


@registry.register("constant")
class Constant(RateDecay):
    """The first rate throughout."""

    def __call__(self, step: int) -> float:
        return self.initial


@registry.register("elastic")
@dataclass(frozen=True)
class Elastic:
    """MEST's elastic mutation (Yuan et al. 2021): the first rate, half of it, and none.

    Their CIFAR runs of 160 epochs replace 20 % of the weights up to epoch 90, 10 % up to 120, and none from there on.
    Raises `UsageError` for a rate outside [0, 1], and shares of the run that are not in order.
    """

    initial: float
    steps: int
    half: float = option(0.5625, "where the rate is halved, as a share of the run", type=float)
    stop: float = option(0.75, "where it ends, as a share of the run", type=float)

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= 1:
            raise UsageError(f"`death_rate` must be in [0, 1], got {self.initial}")
        if not 0 <= self.half <= self.stop <= 1:
            raise UsageError(f"`half` and `stop` must be shares of the run in order, got {self.half} and {self.stop}")

    def __call__(self, step: int) -> float:
        if step >= self.stop * self.steps:
            return 0.0
        return self.initial * (0.5 if step >= self.half * self.steps else 1.0)


@registry.register("stepped")
@dataclass(frozen=True)
class Stepped:
    """The first rate times `factor` after every `every` steps (ITOP's linear schedule; Nowak et al. 2023, Appendix J).

    Raises `UsageError` for a rate outside [0, 1], a factor outside (0, 1], and less than one step.
    """

    initial: float
    steps: int
    factor: float = option(0.99, "what the rate is multiplied by", type=float)
    every: int = option(600, "steps between", type=int, counted=True)

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= 1:
            raise UsageError(f"`death_rate` must be in [0, 1], got {self.initial}")
        if not 0 < self.factor <= 1:
            raise UsageError(f"`factor` must be over 0 and at most 1, got {self.factor}")
        if self.every < 1:
            raise UsageError(f"`every` must be at least 1, got {self.every}")

    def __call__(self, step: int) -> float:
        return self.initial * self.factor ** (step // self.every)
