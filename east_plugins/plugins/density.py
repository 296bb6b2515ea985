"""Global density as a pure function of the step.

Each schedule is a frozen dataclass with `target` (the density at the end), `density(step)` in (0, 1] and
`due(step)`: whether a topology update follows optimizer step number `step` (counted from 1). `end` is the run's last
step. Where `replaces` is False its updates drop and grow for the density's sake only. No hidden state, so resuming
needs the step only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ..errors import UsageError
from .protocols import option
from .registry import density as registry


def check_density(value: float, name: str = "density") -> None:
    """Raise `UsageError` unless 0 < value <= 1 (NaN is refused too)."""
    if not 0 < value <= 1:
        raise UsageError(f"`{name}` must be in (0, 1], got {value}")


@registry.register("constant")
@dataclass(frozen=True)
class Constant:
    """`target` throughout; an update every `frequency` steps before step `end` (None: never; static training)."""

    target: float
    frequency: int | None = None
    end: float = math.inf

    def __post_init__(self) -> None:
        check_density(self.target)
        _check_frequency(self.frequency)

    def density(self, step: int) -> float:
        return self.target

    def due(self, step: int) -> bool:
        return self.frequency is not None and 0 < step < self.end and step % self.frequency == 0


@registry.register("cyclic")
@dataclass(frozen=True)
class Cyclic:
    """EAST's cyclic sparsity (Section 3.3, Algorithm 1): the density swings up to `multiplier` times the target
    and back, `cycles` times, then stays at `target`.

    The first cycle takes `length` steps, each next one `length_mult` times more. In a cycle with phase p in
    [0, 1) the density is `target * (1 + (multiplier - 1) * s)`, s = 1 - |2p - 1| (triangular) or
    (1 - cos 2 pi p) / 2 (cosine). Updates come every `cyclic_frequency` steps, and at the middle and the end of
    every cycle, so that its peak and its close are met exactly; afterwards every `frequency` steps before `end`.
    Inside the cycles an update grows or drops for the density's sake; with `replace` it replaces weights as well.

    Raises `UsageError` for a peak density over 1, or cycles that do not close before `end`.
    """

    target: float
    multiplier: float = 10.0
    cycles: int = 2
    length: int = 1
    length_mult: float = 1.0
    pattern: str = "triangular"
    cyclic_frequency: int = 1
    frequency: int | None = None
    end: float = math.inf
    replace: bool = False

    def __post_init__(self) -> None:
        check_density(self.target)
        _check_frequency(self.frequency)
        _check_frequency(self.cyclic_frequency, "cyclic_frequency")
        allowed = (
            ("pattern", self.pattern, self.pattern in PATTERNS, f"one of {', '.join(PATTERNS)}"),
            ("multiplier", self.multiplier, 1 <= self.multiplier < math.inf, "at least 1"),
            ("cycles", self.cycles, self.cycles >= 1, "at least 1"),
            ("length", self.length, self.length >= 2, "at least 2 steps"),
            ("length_mult", self.length_mult, 0 < self.length_mult < math.inf, "over 0"),
        )
        for name, value, good, what in allowed:
            if not good:
                raise UsageError(f"`{name}` must be {what}, got {value}")
        if self.target * self.multiplier > 1:
            raise UsageError(
                f"`multiplier` {self.multiplier:g} takes the density {self.target:g} to "
                f"{self.target * self.multiplier:g}; allowed is at most {1 / self.target:g}"
            )
        try:
            close = float(self.close)
        except OverflowError:
            raise UsageError(
                f"`length_mult` {self.length_mult:g}: {self.cycles} such cycles never close; "
                f"allowed is before training's last step, {self.end:g}"
            ) from None
        if close >= self.end:
            raise UsageError(
                f"`length`: {self.cycles} cycles close at step {close:.12g}; "
                f"allowed is before training's last step, {self.end:g}"
            )

    @cached_property
    def bounds(self) -> list[int]:
        """Steps at which a cycle begins, and at last the step at which the last one closes."""
        bounds, length = [0], float(self.length)
        for _ in range(self.cycles):
            bounds.append(bounds[-1] + max(2, round(length)))
            length *= self.length_mult
        return bounds

    @property
    def close(self) -> int:
        """First step at which the density is the target for good."""
        return self.bounds[-1]

    def replaces(self, step: int) -> bool:
        """Whether the update at `step` replaces weights."""
        return self.replace or step > self.close

    def density(self, step: int) -> float:
        if not 0 < step < self.close:
            return self.target
        start, stop = self._cycle(step)
        middle = (start + stop) // 2  # a whole step, so that the peak is met where the length is odd
        if step <= middle:
            phase = 0.5 * (step - start) / (middle - start)
        else:
            phase = 0.5 + 0.5 * (step - middle) / (stop - middle)
        return self.target * (1 + (self.multiplier - 1) * PATTERNS[self.pattern](phase))

    def due(self, step: int) -> bool:
        if step <= 0 or step >= self.end:
            return False
        if step > self.close:
            return self.frequency is not None and step % self.frequency == 0
        if step in self.bounds:
            return True
        start, stop = self._cycle(step)
        return (step - start) % self.cyclic_frequency == 0 or step == (start + stop) // 2

    def _cycle(self, step: int) -> tuple[int, int]:
        """Begin and end of the cycle that `step` lies in."""
        return next((a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False) if a <= step < b)


@registry.register("cyclic-open")
@dataclass(frozen=True)
class OpenCyclic(Cyclic):
    """Cycles as the authors' code of EAST runs them (ES2, `sparselearning/core.py`): updates at multiples of
    `cyclic_frequency`, counted from the start of training, and none that closes the last cycle.

    The density that the last of them asks for stays: 1.2 times the target with triangular cycles of 17,600 steps,
    updates every 350 and a peak of 10. The phase of step t of a cycle of n steps is (t - 1) / n. The first update
    after the cycles comes at the next multiple of `cyclic_frequency`, the others every `frequency` steps.
    """

    @property
    def last(self) -> int:
        """Step of the last update inside the cycles; 0 where there is none."""
        return self.close // self.cyclic_frequency * self.cyclic_frequency

    def density(self, step: int) -> float:
        step = min(step, self.last)
        if step <= 0:
            return self.target
        start, stop = next(pair for pair in zip(self.bounds, self.bounds[1:], strict=False) if step <= pair[1])
        swing = PATTERNS[self.pattern]((step - start - 1) / (stop - start))
        return self.target * (1 + (self.multiplier - 1) * swing)

    def due(self, step: int) -> bool:
        if step <= 0 or step >= self.end:
            return False
        if step <= self.last + self.cyclic_frequency:
            return step % self.cyclic_frequency == 0
        return self.frequency is not None and step % self.frequency == 0


PATTERNS = {
    "triangular": lambda phase: 1 - abs(2 * phase - 1),
    "cosine": lambda phase: (1 - math.cos(2 * math.pi * phase)) / 2,
}


@registry.register("gradual")
@dataclass(frozen=True)
class Gradual:
    """Cubic fall from `initial` to `target` between steps `start` and `stop` (Zhu and Gupta 2017; GraNet, Liu et
    al. 2021), updates every `frequency` steps and at `stop`, so that it ends exactly on target."""

    target: float
    initial: float = option(0.5, "density at the beginning", type=float)
    start: int = option(0, "step at which the fall begins", type=int)
    stop: int | None = option(None, "step at which it ends (default: `until`)", type=int)
    until: float = option(0.5, "where it ends, as a share of the run", type=float)
    frequency: int | None = None
    end: float = math.inf

    def __post_init__(self) -> None:
        check_density(self.target)
        check_density(self.initial, "initial")
        _check_frequency(self.frequency)
        if not 0 < self.until < 1:
            raise UsageError(f"`until` must be over 0 and below 1, got {self.until}")
        if not 0 <= self.start < self.last < self.end:
            raise UsageError(f"gradual pruning must run inside training: {self.start} to {self.last} of {self.end:g}")

    @property
    def last(self) -> int:
        """Step at which the density reaches the target."""
        return _part_way(self.stop, self.end, self.until)

    def density(self, step: int) -> float:
        left = 1 - min(max((step - self.start) / (self.last - self.start), 0.0), 1.0)
        return self.target + (self.initial - self.target) * left**3

    def due(self, step: int) -> bool:
        if step == self.last:
            return True
        return self.frequency is not None and 0 < step < self.end and step % self.frequency == 0


@registry.register("one-shot")
@dataclass(frozen=True)
class OneShot:
    """Density `initial` up to step `stop`, then `target` at once: what the prune rule finds most important stays."""

    target: float
    initial: float = option(1.0, "density up to the step", type=float)
    stop: int | None = option(None, "the step (default: half of the run)", type=int)
    frequency: int | None = None
    end: float = math.inf
    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_density(self.target)
        check_density(self.initial, "initial")
        _part_way(self.stop, self.end)

    @property
    def last(self) -> int:
        """Step at which the density falls."""
        return _part_way(self.stop, self.end)

    def density(self, step: int) -> float:
        return self.initial if step < self.last else self.target

    def due(self, step: int) -> bool:
        return step == self.last


@registry.register("topkast")
@dataclass(frozen=True)
class BackwardSet:
    """The density of Top-KAST's backward set, `ratio` times the target, up to the run's last step but one, after which
    the forward set alone is left (Jayakumar et al. 2020; published pairs such as 20 % and 10 % have ratio 2)."""

    target: float
    ratio: float = option(2.0, "weights that get gradients, for each one in passes", type=float)
    frequency: int | None = None
    end: float = math.inf

    def __post_init__(self) -> None:
        check_density(self.target)
        _check_frequency(self.frequency)
        if not 1 <= self.ratio < math.inf:
            raise UsageError(f"`ratio` must be at least 1, got {self.ratio}")
        _check_end(self.end, 2)

    @property
    def last(self) -> int:
        """Step after which the density is the target."""
        return int(self.end) - 1

    def density(self, step: int) -> float:
        return self.target if step >= self.last else min(1.0, self.ratio * self.target)

    def due(self, step: int) -> bool:
        return step == self.last or (self.frequency is not None and 0 < step < self.last and step % self.frequency == 0)


@registry.register("suptickets")
@dataclass(frozen=True)
class Tickets:
    """Constant density; in the last `share` of the run one exploration at the start of each of `tickets` cycles, none
    else (Sup-tickets, Yin et al. 2022; published for CIFAR: three cycles of 8 epochs in the last tenth of 250)."""

    target: float
    share: float = option(0.1, "share of the run that makes tickets, its last", type=float)
    tickets: int = option(3, "cycles, each of which makes one", type=int)
    explore: float = option(0.5, "share of the active weights replaced at the start of a cycle", type=float)
    frequency: int | None = None
    end: float = math.inf

    def __post_init__(self) -> None:
        check_density(self.target)
        _check_frequency(self.frequency)
        allowed = (
            ("share", 0 < self.share < 1, "over 0 and below 1"),
            ("tickets", self.tickets >= 1, "at least 1"),
            ("explore", 0 <= self.explore <= 1, "in [0, 1]"),
        )
        for name, good, what in allowed:
            if not good:
                raise UsageError(f"`{name}` must be {what}, got {getattr(self, name)}")
        _check_end(self.end, 1)
        bounds = self.bounds_of(int(self.end))
        if bounds[0] < 1 or any(after - before < 2 for before, after in zip(bounds, bounds[1:], strict=False)):
            raise UsageError(
                f"`tickets` {self.tickets} in the last {self.share:g} of {self.end:g} steps: allowed are cycles of at "
                "least two steps"
            )

    def bounds_of(self, steps: int) -> list[int]:
        """The step before the first cycle, and the last one of each, in a run of so many steps."""
        length = self.share * steps / self.tickets
        return [steps - round(length * left) for left in range(self.tickets, -1, -1)]

    @property
    def _starts(self) -> list[int]:
        """First steps of the cycles."""
        return [bound + 1 for bound in self.bounds_of(int(self.end))[:-1]]

    def density(self, step: int) -> float:
        return self.target

    def due(self, step: int) -> bool:
        starts = self._starts
        if step >= starts[0]:
            return step in starts
        return self.frequency is not None and 0 < step < starts[0] - 1 and step % self.frequency == 0

    def rate(self, step: int) -> float | None:
        """The share of the weights that an exploration replaces; None before the cycles."""
        return self.explore if step >= self._starts[0] else None


def _part_way(stop: int | None, end: float, share: float = 0.5) -> int:
    """`stop`, or a share of the run; raises `UsageError` where the run has no end to take it of."""
    if stop is not None:
        return stop
    if end == math.inf:
        raise UsageError("`stop` is missing: the step at which the density is the target")
    return max(1, int(end * share))


def _check_end(end: float, least: int) -> None:
    if not least < end < math.inf:
        raise UsageError(f"`end` must be the run's last step, over {least}, got {end:g}")


def _check_frequency(frequency: int | None, name: str = "update_frequency") -> None:
    if frequency is not None and frequency < 1:
        raise UsageError(f"`{name}` must be at least 1 step, got {frequency}")
