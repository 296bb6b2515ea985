"""Our host: owns the masks of a model, keeps them through optimizer steps and updates their topology."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.maskable import maskable, modules_of, theoretical_size, unwrap
from ..ops.select import fetch
from ..plugins.allocation.connected import reconnect
from ..plugins.density import Constant, check_density
from ..plugins.protocols import HostPlugin
from . import presets, topology
from .binding import bound
from .books import Books
from .budgets import Allocation
from .gradients import accumulate, all_finite
from .layers import Column, MaskedWeight
from .optimizer_state import momentum_factor, state_names, state_tensors
from .packed import PackedState
from .stepping import Stepping
from .values import sparse_fan_in

logger = logging.getLogger(__name__)


class Masking(Books):
    """Sparse training host with ITOP's call surface: exact counts, any device, any registered rule.

        mask = Masking(optimizer, death_rate=0.5, death_mode="magnitude", growth_mode="gradient",
                       redistribution_mode="none", death_rate_decay=CosineDecay(0.5, steps), update_frequency=100)
        mask.add_module(model, density=0.001, sparse_init="ERK")
        ...
        loss.backward()
        mask.step()                 # in place of optimizer.step()

    Between updates inactive weights and their optimizer state are exactly zero: the optimizer sees the active values
    of a sparse layer only (or masked gradients, on an accelerator and where a tenth and more is active; every
    supported optimizer leaves a zero with zero gradient at zero). A topology update drops and grows weights so that
    the number of active ones is exactly what the density schedule says.

    Args:
        optimizer: SGD, Adam or AdamW over the model's parameters; others raise `UsageError`.
        death_rate: share of the active weights replaced in one update, where `death_rate_decay` is None.
        death_rate_decay: callable `rate(step)`, or an object with `step()` and `get_dr()` as ITOP's.
        death_mode, growth_mode, redistribution_mode: names in the registries, `module:function`, or callables.
        threshold: option of the prune rule `threshold`.
        args: namespace with ITOP's `fix` and `update_frequency`, where a script passes one.
        update_frequency: steps between updates where neither `args` nor `schedule` says so; None is static.
        schedule: density schedule; by default the density given to `add_module`, constant.
        prune_scope: "local" (every layer drops its own share) or "global" (a falling density drops the least important
            weights over all layers).
        keep_connected: keep grown and kept weights on input-to-output paths (needs `input_shape`).
        seed: seed of all random choices; by default torch's initial seed, without drawing from it.
        plugins: callables run with the host at the end of every step, for example phased activations.
        options: options of plugins that are given by name: kind (`growth`, `pruning`, ...) to option to value.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        death_rate: float = 0.3,
        growth_death_ratio: float = 1.0,
        death_rate_decay: Any = None,
        death_mode: str | Callable = "magnitude",
        growth_mode: str | Callable = "momentum",
        redistribution_mode: str | Callable = "none",
        threshold: float = 0.001,
        args: Any = None,
        *,
        update_frequency: int | None = 100,
        schedule: Any = None,
        prune_scope: str = "local",
        keep_connected: bool = False,
        seed: int | None = None,
        plugins: Sequence[HostPlugin] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        if growth_death_ratio != 1.0:
            raise UsageError(f"growth_death_ratio must be 1 (counts are exact), got {growth_death_ratio}")
        if prune_scope not in ("local", "global"):
            raise UsageError(f"`prune_scope` must be local or global, got {prune_scope!r}")
        if not 0 <= death_rate <= 1:
            raise UsageError(f"`death_rate` must be in [0, 1], got {death_rate}")
        state_names(optimizer)  # raises for an optimizer whose state is unknown
        self.optimizer = optimizer
        self.prune_rate, self.death_rate_decay = death_rate, death_rate_decay
        self.threshold, self.args = threshold, args
        self.keep_connected = keep_connected
        self.plugins = list(plugins)
        self.engine: Any = None  #: the sparse engine, where one is attached
        self.steps = 0
        self._put_off = False  # an update, from a step that a scaler skipped
        self.schedule = schedule
        self._frequency = getattr(args, "update_frequency", update_frequency)
        if getattr(args, "fix", False):
            self._frequency = None
        self._options = {kind: dict(values) for kind, values in (options or {}).items()}
        if death_mode == "threshold":
            self._options.setdefault("pruning", {}).setdefault("threshold", threshold)
        self._bind_rules(growth_mode, death_mode, redistribution_mode, prune_scope)

        seed = torch.initial_seed() if seed is None else seed
        self.generator = torch.Generator().manual_seed(distributed.from_rank_0(seed) % 2**63)
        self._averages = Column(self._records, "momentum")
        self._stepping = Stepping(optimizer, self._records)

        # what add_module finds
        self.density, self.sparse_init = 0.0, ""
        self.input_shape: tuple[int, ...] | None = None
        self._final = 0  # active weights at the target density
        self._allocation: Allocation | None = None

    def _bind_rules(self, growth: str | Callable, prune: str | Callable, share: str | Callable, scope: str) -> None:
        self.growth_mode, grow, self.needs = bound("growth", growth, self, self._options.get("growth"))
        self.death_mode, drop, needs = bound("pruning", prune, self, self._options.get("pruning"))
        self.redistribution_mode, redistribute = "none", None
        if share != "none":
            options = self._options.get("redistribution")
            self.redistribution_mode, redistribute, more = bound("redistribution", share, self, options)
            needs |= more
        self.needs |= needs
        self._rules = topology.Rules(grow, drop, redistribute, scope)

    @classmethod
    def of(
        cls,
        method: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        density: float | None = None,
        **settings: Any,
    ) -> Masking:
        """The host of a method of `train`, its tricks applied to the model: see `host.presets.of`."""
        return presets.of(cls, method, model, optimizer, steps=steps, density=density, **settings)

    # ------------------------------------------------------------------ building

    def add_module(
        self,
        module: nn.Module,
        density: float = 0.05,
        sparse_init: str = "ERK",
        *,
        input_shape: Sequence[int] | None = None,
        weight_init: str = "default",
    ) -> None:
        """Mask all conv and linear weights of `module` at `density` of its theoretical (unshared) size.

        Args:
            density: active share of the unshared network's maskable weights, in (0, 1].
            sparse_init: allocation: ERK, ER, uniform, EPL, EPF, connected, ..., a registered name.
            input_shape: (channels, height, width) of one input, for `connected` and `keep_connected`.
            weight_init: `default` keeps the values, `sparse-fan-in` redraws them for the active fan-in.

        Raises `UsageError` for a second module (wrap both in one `nn.ModuleDict`), a density out of range, or one
        too small to give every layer a weight.
        """
        check_density(density)
        if self.modules:
            raise UsageError("add_module takes one module; wrap several in an nn.ModuleDict")
        if weight_init not in ("default", "sparse-fan-in"):
            raise UsageError(f"`weight_init` must be default or sparse-fan-in, got {weight_init!r}")
        model = unwrap(module)
        weights = maskable(model)
        if not weights:
            raise UsageError("the model has no conv or linear weights to mask")
        if self.keep_connected and input_shape is None:
            raise UsageError("keep_connected needs add_module(..., input_shape=(channels, height, width))")
        schedule = self.schedule or Constant(density, self._frequency)
        if not math.isclose(schedule.target, density):
            raise UsageError(f"`density` {density:g} differs from the schedule's target {schedule.target:g}")
        if not {id(p) for group in self.optimizer.param_groups for p in group["params"]} & {*map(id, weights.values())}:
            raise UsageError("the optimizer has none of the model's conv and linear weights: is it another model's?")
        shape = None if input_shape is None else tuple(input_shape)
        size = theoretical_size(model)
        final, room = round(density * size), sum(weight.numel() for weight in weights.values())
        allocation = Allocation(sparse_init, self._options.get("allocation"))
        drawn = allocation.draw(model, weights, _wanted(schedule, 0, final, room), shape, self.generator)
        self.density, self.sparse_init, self.schedule, self.input_shape = density, sparse_init, schedule, shape
        self.modules, self.theoretical_size, self._final, self._allocation = [module], size, final, allocation
        masks = distributed.from_rank_0(drawn)
        self._records.update({name: MaskedWeight(name, weights[name], mask) for name, mask in masks.items()})
        if weight_init == "sparse-fan-in":
            sparse_fan_in(weights, self.masks, self.generator, modules_of(model))
        self.apply_mask()
        logger.info("%s of %s weights active (density %g)", self.nonzeros, self.theoretical_size, density)

    def remove_weight(self, name: str) -> None:
        """Stop masking the weight called `name` or `name.weight`; it trains densely from here on.

        The other layers keep their budgets, the removed one's goes with it. Raises `UsageError` for an unknown name.
        """
        name = self._full(name)
        self._final -= self._budgets(self._final)[name]
        super().remove_weight(name)

    @property
    def dense_gradient_next(self) -> bool:
        """Whether the next step has a topology update by a rule that scores with the dense gradient."""
        return "grad" in self.needs and self._due_next

    @property
    def _due_next(self) -> bool:
        return self._put_off or self.schedule.due(self.steps + 1)

    def target_nonzeros(self, step: int) -> int:
        """Active weights that the schedule asks for at `step`: exactly `density(step) / target` times the count
        at the target, within what the (possibly shared) tensors can hold and one weight a layer."""
        self._module("target_nonzeros")
        return _wanted(self.schedule, step, self._final, sum(each.weight.numel() for each in self._records.values()))

    # ------------------------------------------------------------------ stepping

    def step(self, closure: Callable | None = None, *, scaler: Any = None):
        """One optimizer step on the active weights, and the topology update where the schedule has one.

        `closure` is handed to the optimizer; `scaler` is a `torch.amp.GradScaler` (call its `update()` yourself,
        as ever). Returns what the optimizer's step returns.
        """
        self._module("step")
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        due = self._due_next
        if due and scaler is not None and not all_finite(self._stepping.gradients().values()):
            due, self._put_off = False, True  # the scaler skips this step, whose gradients say nothing
        elif due:
            self._put_off = False
        prepared = functools.partial(self._prepared, due, scaler is not None)
        if closure is not None:
            result = self._stepping.with_closure(self.optimizer.step, closure, prepared)
        else:
            with prepared():
                result = self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        self._stepped(due)
        return result

    def _prepared(self, due: bool, skip_infinite: bool) -> contextlib.AbstractContextManager:
        """Around the optimizer's step. `skip_infinite`: a scaler may skip it because of gradients that overflowed."""
        if "momentum" in self.needs:
            grads = self._stepping.gradients()
            if skip_infinite:
                grads = {name: grad.nan_to_num(0, 0, 0) for name, grad in grads.items()}
            accumulate(self._averages, grads, momentum_factor(self.optimizer))
        return self._stepping.prepared(due and "grad" in self.needs, self.engine)

    def _stepped(self, due: bool) -> None:
        """All that follows the optimizer's step."""
        self.steps += 1
        self._decay_rate()
        if due:
            with self._stepping.dense_gradients():
                self.truncate_weights()
                self.print_nonzero_counts()
        for plugin in self.plugins:
            plugin(self)
        if self.engine is not None:
            self.engine.stepped()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set inactive weights and their optimizer state to zero; needed only after somebody else changed them."""
        for record in self._records.values():
            for tensor in (record.weight, *state_tensors(self.optimizer, record.weight)):
                tensor.masked_fill_(~record.mask, 0)
            self._stepping.follow(record)
        self._stepping.masked.follow(self.masks)

    @torch.no_grad()
    def truncate_weights(self) -> None:
        """One topology update at the current step: prune, redistribute, grow; counts are exact afterwards.

        Gradient rules need the dense gradient: call it after `backward()`, or leave it to `step()`. Raises
        `UsageError` where the gradients were masked by a step already.
        """
        self._module("truncate_weights")
        self._check_dense_gradients()
        records = list(self._records.values())
        before = [record.active for record in records]
        masks = {record.name: record.mask.clone() for record in records} if self.keep_connected else {}
        budgets = self._budgets(self.target_nonzeros(self.steps))
        changes = [
            topology.Change(record.seen(self.generator, "grad" in self.needs), active.flat, budgets[record.name])
            for record, active in zip(records, before, strict=True)
        ]
        rate = self.prune_rate if getattr(self.schedule, "replaces", True) else 0.0
        topology.update(changes, self._rules, rate, self.generator)
        if self.keep_connected:
            self._reconnect(changes, masks)
        gone = [~record.mask.view(-1)[active.flat] for record, active in zip(records, before, strict=True)]
        numbers = fetch([each.sum().view(1) for each in gone])
        for record, change, active, dropped, n in zip(records, changes, before, gone, numbers, strict=True):
            record.count, record.dropped = change.count, int(n)
            record.fired |= record.mask
            for tensor in (change.layer.weight, *state_tensors(self.optimizer, record.weight)):
                active.drop(tensor, dropped)
            self._stepping.follow(record)
        self._stepping.masked.follow(self.masks)

    def _reconnect(self, changes: Sequence[topology.Change], before: dict[str, Tensor]) -> None:
        """Bring what an update left off path back onto paths, by importance and by growth score."""
        assert self.input_shape is not None
        scores = {}
        for layer in (change.layer for change in changes):
            known = layer.mask | before[layer.name]
            scores[layer.name] = torch.where(known, self._rules.prune(layer, 0), self._rules.grow(layer, 0))
        reconnect(unwrap(self.modules[0]), self.masks, before, scores, self.input_shape, self.generator)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step, random state and running averages: all that a resumed run needs."""
        self._module("state_dict")
        decay = self.death_rate_decay
        return {
            "masks": dict(self.masks),
            "fired_masks": dict(self.fired_masks),
            "momentum": dict(self._averages),
            "steps": self.steps,
            "put_off": self._put_off,
            "death_rate": self.prune_rate,
            "decay": decay.state_dict() if hasattr(decay, "state_dict") else None,
            "drawn": self.allocation.drawn,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in place; inactive weights are zeroed.

        Raises `UsageError` where the state's layers are not this model's.
        """
        self._module("load_state_dict")
        masks = state["masks"]
        if wrong := set(masks) ^ set(self.masks) or {n for n in masks if masks[n].shape != self.masks[n].shape}:
            raise UsageError(f"the saved masks do not fit the model; layers that differ: {', '.join(sorted(wrong))}")
        for name, record in self._records.items():
            record.mask.copy_(masks[name])
            record.fired.copy_(state["fired_masks"][name])
            average = state["momentum"].get(name)
            record.momentum = None if average is None else average.to(record.weight.device, copy=True)
        if state["decay"] is not None:
            self.death_rate_decay.load_state_dict(state["decay"])
        elif hasattr(self.death_rate_decay, "get_dr"):  # ITOP's own classes only count
            for _ in range(state["steps"] - self.steps):
                self.death_rate_decay.step()
        self.allocation.take(state["drawn"])
        self.steps, self.prune_rate, self._put_off = state["steps"], state["death_rate"], state["put_off"]
        self.generator.set_state(state["generator"].cpu())
        self.apply_mask()

    # ------------------------------------------------------------------ ITOP's and sparse_learning's names

    @property
    def death_rate(self) -> float:
        """The prune rate."""
        return self.prune_rate

    @death_rate.setter
    def death_rate(self, rate: float) -> None:
        self.prune_rate = rate

    @property
    def name2prune_rate(self) -> dict[str, float]:
        return dict.fromkeys(self._records, self.prune_rate)

    @property
    def prune_every_k_steps(self) -> int | None:
        """Steps between topology updates; None where there are none. Can be set at any time, as in ITOP; cycles and
        the end of gradual pruning keep the updates that their densities need."""
        return self._frequency if self.schedule is None else getattr(self.schedule, "frequency", None)

    @prune_every_k_steps.setter
    def prune_every_k_steps(self, steps: int | None) -> None:
        if self.schedule is None:
            self._frequency = Constant(1.0, steps).frequency  # checked there
        elif "frequency" in getattr(self.schedule, "__dataclass_fields__", ()):
            self.schedule = dataclasses.replace(self.schedule, frequency=steps)
        else:
            raise UsageError(f"prune_every_k_steps: a {type(self.schedule).__name__} schedule has its own update steps")

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        return self._averages[self._name_of(weight)]

    def get_gradient_for_weights(self, weight: Tensor) -> Tensor:
        return self._records[self._name_of(weight)].seen(self.generator, needs_grad=True).grad.clone()

    # ------------------------------------------------------------------ inside

    @property
    def packed(self) -> PackedState:
        """The optimizer's state of weights that are stepped packed."""
        return self._stepping.packed

    @property
    def allocation(self) -> Allocation:
        """How active weights are shared out over the layers."""
        self._module("allocation")
        assert self._allocation is not None
        return self._allocation

    def _budgets(self, total: int) -> dict[str, int]:
        return self.allocation.budgets({name: record.weight for name, record in self._records.items()}, total)

    def _check_dense_gradients(self) -> None:
        for name in self._records if "grad" in self.needs else ():
            if self._stepping.masked_already(name) or (self.engine and self.engine.holds_gradient(name)):
                raise UsageError(
                    f"truncate_weights: the gradient of {name} was masked by step() already; "
                    "call it after backward() and before step(), or use update_frequency"
                )

    def _decay_rate(self) -> None:
        decay = self.death_rate_decay
        if hasattr(decay, "get_dr"):
            decay.step()
            self.prune_rate = decay.get_dr()
        elif decay is not None:
            self.prune_rate = decay(self.steps)


def _wanted(schedule: Any, step: int, final: int, room: int) -> int:
    """Active weights at a step, from those at the schedule's target and what there is room for."""
    return min(round(final * (schedule.density(step) / schedule.target)), room)
