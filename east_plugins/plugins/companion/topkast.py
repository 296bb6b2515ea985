"""Top-KAST's two sets: the host's active weights are trained, and the largest of them alone are there in passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...ops.active import Active
from ...ops.select import lowest, together
from ..protocols import option
from ..registry import companion


@companion.register("topkast")
@dataclass
class TopKast:
    """Passes with the largest of the trained weights only, as many as the target density has; gradients go to all of
    them (Top-KAST, Jayakumar et al. 2020, Section 2).

    The host's active weights are the backward set B. Between steps those that are not in the forward set A are zero in
    the model, so that whatever runs it, training and evaluation alike, computes with A; for the optimizer's step they
    come back. B, and A in it, are chosen anew at every topology update, each layer's by magnitude; at first among all
    initial weights.

    The L2 penalty of weights outside A is `penalty` / density times the optimizer's weight decay (Section 2.3).
    """

    steps: int
    penalty: float = option(1.0, "factor on the decay outside the forward set, weight decay / density", type=float)
    _hidden: dict[str, tuple[Active, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _chosen: dict[str, tuple[Active, Active]] = field(default_factory=dict, init=False, repr=False)
    _restored: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < math.inf:
            raise UsageError(f"`penalty` must be at least 0, got {self.penalty}")

    def begin(self, host: Any) -> None:
        """Begin with the largest of all initial weights."""
        host.truncate_weights()
        for name, fired in host.fired_masks.items():
            fired.copy_(host.masks[name])
        self(host)

    @torch.no_grad()
    def __call__(self, host: Any) -> None:
        """Take the weights outside the forward set out of the model."""
        self._choose(host)
        for name, (_, outside) in self._chosen.items():
            weight = host.weights[name].data  # leaves no trace in its version, which says whether others wrote
            self._hidden[name] = outside, outside.values(weight)
            outside.put(weight, 0.0)

    def _choose(self, host: Any) -> None:
        """Which weights those are: after an update, and in layers whose active ones somebody else changed."""
        updated = host.schedule.due(host.steps)
        self._chosen = {
            name: (active, outside)
            for name, (active, outside) in self._chosen.items()
            if not updated and _alike(host.active(name), active)
        }
        budgets = host.budgets
        for name, weight in host.weights.items():
            active = host.active(name)
            if name not in self._chosen and len(active) > budgets[name]:
                sizes = active.values(weight.detach()).abs()
                (least,) = together([lowest(sizes, len(active) - budgets[name], host.generator)])
                self._chosen[name] = active, _at(active.flat[least], weight)

    @torch.no_grad()
    def before(self, host: Any) -> None:
        """Put them back, and add their penalty to the gradients."""
        self._take_up(host)
        groups = {id(p): group for group in host.optimizer.param_groups for p in group["params"]}
        for name, (outside, values) in self._hidden.items():
            weight, group = host.weights[name], groups.get(id(host.weights[name]), {})
            outside.put(weight.data, values)
            more = (self.penalty / host.schedule.target - 1) * group.get("weight_decay", 0.0)
            if not more or weight.grad is None:
                continue
            if isinstance(host.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
                outside.put(weight.data, values * (1 - group["lr"] * more))
            else:
                outside.put(weight.grad, outside.values(weight.grad) + more * values)
        self._hidden = {}

    def _take_up(self, host: Any) -> None:
        """What was restored, now that the masks are there that it belongs to."""
        for name, (places, values) in self._restored.items():
            weight = host.weights[name]
            outside = _at(places.to(weight.device), weight)
            self._hidden[name] = outside, values.to(weight.device)
            self._chosen[name] = host.active(name), outside
        self._restored = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: (outside.flat, values) for name, (outside, values) in self._hidden.items()} | self._restored

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored, self._hidden, self._chosen = dict(state), {}, {}


def _alike(one: Active, other: Active) -> bool:
    return one is other or torch.equal(one.flat, other.flat)


def _at(places: Tensor, like: Tensor) -> Active:
    """The positions in a tensor's shape."""
    mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    mask.view(-1)[places] = True
    return Active(mask, len(places))
