"""How long a run is: its epochs, steps and first learning-rate drop, found in what the script has built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, StepLR
from torch.utils.data import DataLoader, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from ..errors import UsageError
from ..plugins.rate import RateDecay


@dataclass(frozen=True)
class Length:
    """Epochs and steps of a run; `first_drop` is the epoch of the first learning-rate drop (None: no drop)."""

    epochs: float
    steps_per_epoch: int
    first_drop: float | None = None

    @property
    def steps(self) -> int:
        return round(self.epochs * self.steps_per_epoch)


def observe(
    optimizer: Optimizer,
    rate_decay: Any = None,
    namespace: Any = None,
    epochs: float | None = None,
    steps_per_epoch: int | None = None,
) -> Length:
    """The length of the run that `optimizer` belongs to.

    An epoch is the longest randomly sampled DataLoader; the number of epochs comes from the prune rate's decay
    (a cosine's T_max is the number of steps), else from the script's parsed flags (`epochs`, times `multiplier`).
    `epochs` and `steps_per_epoch` go before what is found. Raises `UsageError` naming the flag where neither is.
    """
    steps_per_epoch = steps_per_epoch or _steps_per_epoch()
    if epochs is None and (total := decay_steps(rate_decay)):
        epochs = total / steps_per_epoch
    if epochs is None and isinstance(getattr(namespace, "epochs", None), (int, float)):
        epochs = namespace.epochs * getattr(namespace, "multiplier", 1)
    if not epochs:
        raise UsageError("--east-epochs is needed: the run's length was found neither in its decay nor in its flags")
    return Length(epochs, steps_per_epoch, _first_drop(optimizer, epochs, steps_per_epoch))


def decay_steps(decay: Any) -> int | None:
    """Steps over which a decay of the prune rate runs; None where it does not say."""
    if stepper := getattr(decay, "cosine_stepper", None):
        return stepper.T_max
    if decrement := getattr(decay, "decrement", None):  # sparse_learning's linear decay
        return decay.steps + round(decay.current_prune_rate / decrement)
    rate = getattr(decay, "_rate", decay)
    return rate.steps if isinstance(rate, RateDecay) else None


def _steps_per_epoch() -> int:
    random: list[int] = []
    others: list[int] = []
    for loader in _living(DataLoader):
        try:
            (random if _shuffled(loader.sampler) else others).append(len(loader))
        except TypeError:  # an iterable data set without a length
            continue
    if not (lengths := random or others):
        raise UsageError("--east-steps-per-epoch is needed: the script has no DataLoader of a known length")
    return max(lengths)


def _shuffled(sampler: Sampler) -> bool:
    if isinstance(sampler, DistributedSampler):
        return sampler.shuffle
    return isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def _first_drop(optimizer: Optimizer, epochs: float, steps_per_epoch: int) -> float | None:
    """Milestones count epochs, or steps where there are not so many epochs."""
    drops: list[float] = []
    for scheduler in _living(LRScheduler):
        if scheduler.optimizer is not optimizer:
            continue
        if isinstance(scheduler, MultiStepLR):
            drops += list(scheduler.milestones)
        elif isinstance(scheduler, StepLR):
            drops.append(scheduler.step_size)
    drops = [drop if drop <= epochs else drop / steps_per_epoch for drop in drops if drop > 0]
    return min((drop for drop in drops if drop <= epochs), default=None)


def _living(kind: type) -> Iterator[Any]:
    """All objects of a class that the script has built so far and still holds."""
    return (thing for thing in gc.get_objects() if issubclass(type(thing), kind))
