"""Topology updates of a host: how many weights each layer is to have, and how they get there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.select import fetch
from ..plugins.allocation.connected import reconnect
from ..plugins.protocols import Layer, Moment, Structure
from . import structured, topology
from .binding import bound
from .budgets import Allocation, blocks
from .layers import MaskedWeight
from .stepping import Stepping

Spec = str | Callable

#: What makes a whole number of the share of a layer that is replaced.
ROUNDINGS: dict[str, Callable[[float], int]] = {"floor": int, "ceil": math.ceil}


class RuleSet:
    """The three rules of a host, found by what it was given for them.

    Attributes:
        names: of the growth, prune and redistribution rule.
        needs: what they read of a layer beside weight and mask: "grad", "momentum", "mean_grad", "memory", "average".
        pruner: the prune rule as it was given, or found by its name.
        window: steps, up to an update, whose mean gradient they need; 0 where they need none.
    """

    def __init__(
        self,
        growth: Spec,
        prune: Spec,
        redistribution: Spec,
        scope: str,
        rounding: str,
        host: Any,
        options: Mapping[str, Mapping[str, Any]],
    ):
        if scope not in topology.SCOPES:
            raise UsageError(f"`prune_scope` must be one of {', '.join(topology.SCOPES)}, got {scope!r}")
        if rounding not in ROUNDINGS:
            raise UsageError(f"`prune_rounding` must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        grow = bound("growth", growth, host, options.get("growth"))
        drop = bound("pruning", prune, host, options.get("pruning"))
        none = redistribution == "none"
        share = None if none else bound("redistribution", redistribution, host, options.get("redistribution"))
        self.names = grow.name, drop.name, share.name if share else "none"
        self.needs = grow.needs | drop.needs | (share.needs if share else set())
        self.pruner = drop.plugin
        of_means = [rule.plugin for rule in (grow, drop, share) if rule and "mean_grad" in rule.needs]
        self.window = max((getattr(plugin, "batches", 1) for plugin in of_means), default=0)
        over_layers = getattr(drop.plugin, "over_layers", None)
        whole = ROUNDINGS[rounding]
        self.rules = topology.Rules(
            grow.rule, drop.rule, share and share.rule, scope, whole, over_layers, pointwise=drop.pointwise
        )


class Updates:
    """Prunes and grows the weights of one model.

    Attributes:
        final: active weights at the target density, over all layers.
        allocation: how they are shared out.
    """

    def __init__(
        self,
        records: Mapping[str, MaskedWeight],
        allocation: Allocation,
        final: int,
        generator: torch.Generator,
        connected: tuple[nn.Module, Sequence[int]] | None = None,
    ):
        """`connected`: the model and an input's shape, where weights are to be kept on paths."""
        self.records, self.allocation, self.final = records, allocation, final
        self.generator, self.connected = generator, connected

    @property
    def size(self) -> int:
        """Weights of the unshared network."""
        return sum(record.uses * record.weight.numel() for record in self.records.values())

    def budgets(self, density: float, total: int) -> dict[str, int]:
        """Active weights of every block, `total` over all, which `density` is as a whole number."""
        return self.allocation.budgets(blocks(self.records), density * self.size, total)

    def budgets_at(self, schedule: Any, step: int) -> dict[str, int]:
        """Active weights of every block that a density schedule asks for at a step."""
        room = sum(record.weight.numel() for record in self.records.values())
        return self.budgets(schedule.density(step), wanted(schedule, step, self.final, room))

    def forget(self, name: str) -> None:
        """Take a layer's budget out of the total: it is going to be removed."""
        record, budgets = self.records[name], self.budgets(self.final / self.size, self.final)
        self.final -= sum(budgets[key] for key in record.keys)

    @torch.no_grad()
    def update(
        self,
        rules: RuleSet,
        budgets: Mapping[str, int],
        rate: float,
        stepping: Stepping,
        structure: Structure | None,
        moment: Moment,
    ) -> None:
        """One update to `budgets` active weights of each block, at most where a `structure` chooses them; a share
        `rate` of those that remain is replaced."""
        stepping.mask_what_others_wrote()
        records = list(self.records.values())
        before = [record.active for record in records]
        for record in records:
            record.remember()
        masks = {record.name: record.mask.clone() for record in records} if self.connected else {}
        changes = self._changes(rules.needs, budgets, rate)
        every = [change for parts in changes for change in parts]
        if structure is None:
            topology.update(every, rules.rules, self.generator)
        else:
            structured.update(every, rules.rules, structure, moment)
        if self.connected:
            self._reconnect(rules.rules, [change.layer for change in every], masks)
        gone = [~record.mask.view(-1)[active.flat] for record, active in zip(records, before, strict=True)]
        numbers = fetch([each.sum().view(1) for each in gone])
        for record, parts, active, dropped, n in zip(records, changes, before, gone, numbers, strict=True):
            record.count, record.dropped = sum(change.count for change in parts), int(n)
            record.fired |= record.mask
            off = None if record.weight.is_cpu else ~record.mask  # an accelerator writes all sooner than a few
            average = [] if record.average is None else [record.average]
            for tensor in (record.weight.detach(), *stepping.all_states(record.weight), *average):
                active.drop(tensor, dropped) if off is None else tensor.masked_fill_(off, 0)
            if record.memory is not None:
                record.weight.copy_(torch.where(record.mask, record.memory, 0))
            stepping.packed.move(record.weight, record.active)
        stepping.masked.follow({record.name: record.mask for record in records})
        stepping.left(updated=True)

    def _changes(self, needs: set[str], budgets: Mapping[str, int], rate: float) -> list[list[topology.Change]]:
        """What an update is to do with the blocks of every weight. Those that get no gradient stay, as far as the
        density lets them."""
        some = bool(needs) and any(record.weight.grad is not None for record in self.records.values())
        changes = []
        for record in self.records.values():
            seen = record.seen(self.generator, needs, some)
            still = not record.weight.requires_grad or (some and record.weight.grad is None)
            parts = zip(record.keys, seen, record.places(), strict=True)
            changes.append([topology.Change(each, at, budgets[key], 0.0 if still else rate) for key, each, at in parts])
        return changes

    @torch.no_grad()
    def removed(self, rules: RuleSet, rate: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Masks of the weights that an update at the present density would prune; nothing is changed."""
        budgets = {key: len(at) for r in self.records.values() for key, at in zip(r.keys, r.places(), strict=True)}
        changes = self._changes(rules.needs, budgets, rate)
        for change in (each for parts in changes for each in parts):
            change.layer = dataclasses.replace(change.layer, mask=change.layer.mask.clone(), generator=generator)
        topology.drop([change for parts in changes for change in parts], rules.rules, generator)
        left = {record.name: torch.cat([change.layer.mask for change in parts])
                for record, parts in zip(self.records.values(), changes, strict=True)}  # fmt: skip
        return {name: self.records[name].mask & ~mask for name, mask in left.items()}

    def _reconnect(self, rules: topology.Rules, seen: Sequence[Layer], before: Mapping[str, Tensor]) -> None:
        """Bring what an update left off path back onto paths, by importance and by growth score."""
        assert self.connected is not None
        model, shape = self.connected
        scores = {}
        for layer in seen:
            known = layer.mask | before[layer.name]
            scores[layer.name] = torch.where(known, rules.prune(layer, 0), rules.grow(layer, 0))
        masks = {record.name: record.mask for record in self.records.values()}
        reconnect(model, masks, before, scores, shape, self.generator)


def wanted(schedule: Any, step: int, final: int, room: int) -> int:
    """Active weights at a step, from those at the schedule's target and what there is room for; all at density 1."""
    if schedule.density(step) == 1:
        return room
    return min(round(final * (schedule.density(step) / schedule.target)), room)
