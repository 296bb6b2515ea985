"""The pace of a host: at which of its steps the topology is updated, and how much of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import UsageError
from ..plugins.density import Constant
from .scaling import number, steps_between


class Pace:
    """Counts steps, and knows the density schedule and the prune rate.

    Attributes:
        steps: optimizer steps made.
        schedule: density schedule; None before a model is added, where none was given.
        prune_rate: share of the active weights that the next update replaces (ITOP: death rate).
        death_rate_decay: callable `rate(step)`, or an object with `step()` and `get_dr()`; None: the rate stays.
    """

    def __init__(self, schedule: Any, frequency: Any, rate: Any, decay: Any):
        self.steps = 0
        self.schedule, self.death_rate_decay = schedule, decay
        self.prune_rate = number("death_rate", rate)
        if not 0 <= self.prune_rate <= 1:
            raise UsageError(f"`death_rate` must be in [0, 1], got {rate}")
        self._frequency = steps_between(frequency)
        self._put_off = False  # an update, from a step that a scaler skipped

    @property
    def death_rate(self) -> float:
        """The prune rate."""
        return self.prune_rate

    @death_rate.setter
    def death_rate(self, rate: float) -> None:
        self.prune_rate = rate

    @property
    def prune_every_k_steps(self) -> int | None:
        """Steps between topology updates; None where there are none. Can be set at any time, as in ITOP; cycles and
        the end of gradual pruning keep the updates that their densities need."""
        return self._frequency if self.schedule is None else getattr(self.schedule, "frequency", None)

    @prune_every_k_steps.setter
    def prune_every_k_steps(self, steps: int | None) -> None:
        steps = steps_between(steps)
        if self.schedule is None:
            self._frequency = Constant(1.0, steps).frequency  # checked there
        elif "frequency" in getattr(self.schedule, "__dataclass_fields__", ()) and self._replaces:
            self.schedule = dataclasses.replace(self.schedule, frequency=steps)
        else:
            raise UsageError(f"prune_every_k_steps: a {type(self.schedule).__name__} schedule has its own update steps")

    @property
    def _due_next(self) -> bool:
        return self._put_off or self.schedule.due(self.steps + 1)

    def _due_within(self, window: int) -> bool:
        """Whether one of the next `window` steps has a topology update."""
        return window > 0 and (self._due_next or any(self.schedule.due(self.steps + i) for i in range(2, window + 1)))

    @property
    def _rate_now(self) -> float:
        """The prune rate of an update now; 0 where the schedule's updates replace nothing."""
        own = getattr(self.schedule, "rate", None)
        if own is not None and (rate := own(self.steps)) is not None:
            return rate
        replaces = self._replaces
        return self.prune_rate if (replaces(self.steps) if callable(replaces) else replaces) else 0.0

    @property
    def _replaces(self) -> Any:
        """Whether updates replace weights: true or false, or a function of the step."""
        return getattr(self.schedule, "replaces", True)

    def _count_step(self) -> None:
        self.steps += 1
        decay = self.death_rate_decay
        if hasattr(decay, "get_dr"):
            decay.step()
            self.prune_rate = decay.get_dr()
        elif decay is not None:
            self.prune_rate = decay(self.steps)
