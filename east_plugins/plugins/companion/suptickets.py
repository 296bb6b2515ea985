"""Sup-tickets: cheap tickets of the last part of training, averaged and pruned to the density again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.maskable import unwrap
from ...ops.modes import forked_rng
from ..allocation.saliency import keep_highest
from ..protocols import option
from ..registry import companion


@companion.register("suptickets")
@dataclass
class SupTickets:
    """Superposes the tickets that the density schedule `suptickets` makes room for (Yin et al. 2022).

    The network before the first cycle, and at the end of each, is a ticket. After the n-th cycle the average is
    `(n * average + ticket) / (n + 1)`, pruned by magnitude over all layers to the density (every layer keeps a
    weight). After the last step the average takes the network's place, and its batch norms' statistics are found anew
    on `host.batches`, where there are some. In a cycle the learning rate goes from `low` to `high` and back, as
    factors of the run's first one; published for CIFAR: 0.001 to 0.005 after 0.1.
    """

    steps: int
    low: float = option(0.01, "learning rate at the ends of a cycle, times the run's first one", type=float)
    high: float = option(0.05, "learning rate in its middle, times the run's first one", type=float)
    _average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _tickets: int = field(default=0, init=False, repr=False)
    _first: list[float] = field(default_factory=list, init=False, repr=False)
    _rates: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"`{name}` must be over 0, got {getattr(self, name)}")

    def begin(self, host: Any) -> None:
        if not hasattr(host.schedule, "bounds_of"):
            raise UsageError(
                "`companion` suptickets needs `density_schedule` suptickets, which says when tickets are made"
            )
        self._first = [float(group["lr"]) for group in host.optimizer.param_groups]

    def _bounds(self, host: Any) -> list[int]:
        return host.schedule.bounds_of(self.steps)

    def before(self, host: Any) -> None:
        """In a cycle, its learning rate for this step; whoever schedules the rate finds his own again after it."""
        bounds, step = self._bounds(host), host.steps + 1
        if not bounds[0] < step <= bounds[-1]:
            return
        start, stop = next(pair for pair in zip(bounds, bounds[1:], strict=False) if step <= pair[1])
        swing = 1 - abs(2 * (step - start) / (stop - start) - 1)
        factor = self.low + (self.high - self.low) * swing
        groups = host.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        for i, group in enumerate(groups):
            first = group.get("initial_lr", self._first[min(i, len(self._first) - 1)])
            group["lr"] = factor * float(first)

    @torch.no_grad()
    def __call__(self, host: Any) -> None:
        for group, rate in zip(host.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
        if host.steps not in self._bounds(host):
            return
        model = unwrap(host.modules[0])
        self._superpose(_values(model), host)
        if host.steps == self.steps:
            self._settle(model, host)

    def _superpose(self, ticket: Mapping[str, Tensor], host: Any) -> None:
        """Take a ticket into the average, and prune that to the density."""
        if self._tickets and set(ticket) != set(self._average):
            raise UsageError("`companion` suptickets: the network's parameters changed between two tickets; phased "
                             "activations must have ended before the first one")  # fmt: skip
        self._tickets += 1
        if self._tickets == 1:
            self._average = {name: value.clone() for name, value in ticket.items()}
            return
        for name, value in ticket.items():
            self._average[name].lerp_(value, 1 / self._tickets)
        for name, mask in self._pruned(host).items():
            self._average[name].masked_fill_(~mask, 0)

    def _pruned(self, host: Any) -> dict[str, Tensor]:
        """Masks of the largest weights of the average, as many as the target density has."""
        sizes = {name: self._average[name].abs() for name in host.weights}
        everywhere = {name: torch.ones_like(size, dtype=torch.bool) for name, size in sizes.items()}
        return keep_highest(everywhere, list(sizes.values()), sum(host.budgets.values()), host.generator)

    def _settle(self, model: nn.Module, host: Any) -> None:
        """Put the average in the network's place."""
        masks = self._pruned(host)
        for name, value in _values(model).items():
            value.copy_(self._average[name])
        for name, mask in masks.items():
            host.masks[name] = mask
        host.apply_mask()
        if host.batches is not None:
            _new_statistics(model, host.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "tickets": self._tickets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = {name: value.clone() for name, value in state["average"].items()}
        self._tickets = state["tickets"]


def _values(model: nn.Module) -> dict[str, Tensor]:
    """What of a model can be averaged: parameters and statistics, no counters."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _new_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Means and variances of batch norms over all batches; PyTorch's random state stays."""
    device = next(model.parameters()).device
    with forked_rng(device):
        torch.optim.swa_utils.update_bn(batches, model, device)
