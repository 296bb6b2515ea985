"""Our host: owns the masks of a model, keeps them through optimizer steps and updates their topology."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.maskable import modules_of, unwrap
from ..ops.select import fetch
from ..plugins.allocation.connected import reconnect
from ..plugins.density import Constant, check_density
from ..plugins.protocols import HostPlugin, Layer
from . import presets, topology
from .binding import bound
from .books import Books
from .budgets import Allocation, blocks, draw
from .choice import Exclude, check_followed, choose
from .gradients import accumulate, all_finite
from .layers import Column, MaskedWeight
from .optimizer_state import momentum_factor, state_names, state_tensors
from .packed import PackedState
from .scaling import number, steps_between, unscale
from .stepping import Stepping
from .values import sparse_fan_in
from .watch import Stepped, attend

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
        death_rate = number("death_rate", death_rate)
        if not 0 <= death_rate <= 1:
            raise UsageError(f"`death_rate` must be in [0, 1], got {death_rate}")
        state_names(optimizer)  # raises for an optimizer whose state is unknown
        self.prune_rate, self.death_rate_decay = death_rate, death_rate_decay
        self.threshold, self.args = threshold, args
        self.keep_connected = keep_connected
        self.plugins = list(plugins)
        self.engine: Any = None  #: the sparse engine, where one is attached
        self.steps = 0
        self._put_off = False  # an update, from a step that a scaler skipped
        self.schedule = schedule
        self._frequency = steps_between(getattr(args, "update_frequency", update_frequency))
        if getattr(args, "fix", False):
            self._frequency = None
        self._options = {kind: dict(values) for kind, values in (options or {}).items()}
        if death_mode == "threshold":
            self._options.setdefault("pruning", {}).setdefault("threshold", threshold)
        self._asked = growth_mode, death_mode, redistribution_mode, prune_scope
        self._bind_rules(*self._asked)

        seed = torch.initial_seed() if seed is None else seed
        self.generator = torch.Generator().manual_seed(distributed.from_rank_0(seed) % 2**63)
        self._stepping = Stepping(optimizer, self._records)
        self._stepped = Stepped()
        self._in_step = False

        # what add_module finds
        self.density, self.sparse_init = 0.0, ""
        self.input_shape: tuple[int, ...] | None = None
        self._final = 0  # active weights at the target density
        self._allocation: Allocation | None = None
        self._frozen: dict[str, nn.Parameter] = {}

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
        exclude: Exclude | Iterable[Exclude] = (),
        input_shape: Sequence[int] | None = None,
        weight_init: str = "default",
    ) -> None:
        """Mask the matrices of `module` that are trained, at `density` of their theoretical (unshared) size: weights
        of convolutions, linear and bilinear layers, embeddings, recurrent layers (each gate) and attention (each of
        q, k and v). Frozen weights are left as they are, and count nowhere.

        Args:
            density: active share of the unshared network's masked weights, in (0, 1].
            sparse_init: allocation: ERK, ER, uniform, EPL, EPF, connected, ..., a registered name.
            exclude: what is left dense: names of parameters or modules, patterns (`layer4.*`), modules, classes.
            input_shape: (channels, height, width) of one input, for `connected` and `keep_connected`.
            weight_init: `default` keeps the values, `sparse-fan-in` redraws them for the active fan-in.

        Raises `UsageError` for a second module (wrap both in one `nn.ModuleDict`), a density out of range, one too
        small to give every layer a weight, and for layers whose weights cannot be masked.
        """
        density = number("density", density)
        check_density(density)
        if self.modules:
            raise UsageError("add_module takes one module; wrap several in an nn.ModuleDict")
        if weight_init not in ("default", "sparse-fan-in"):
            raise UsageError(f"`weight_init` must be default or sparse-fan-in, got {weight_init!r}")
        if self.keep_connected and input_shape is None:
            raise UsageError("keep_connected needs add_module(..., input_shape=(channels, height, width))")
        chosen, frozen = choose(module, exclude)
        if not chosen:
            raise UsageError("the model has no conv or linear weights to mask" + " that are trained" * bool(frozen))
        schedule = self.schedule or Constant(density, self._frequency)
        if not math.isclose(schedule.target, density):
            raise UsageError(f"`density` {density:g} differs from the schedule's target {schedule.target:g}")
        if not _holds(self.optimizer, (each.weight for each in chosen.values())):
            raise UsageError("the optimizer has none of the model's conv and linear weights: is it another model's?")
        shape = None if input_shape is None else tuple(input_shape)
        size = sum(each.uses * each.weight.numel() for each in chosen.values())
        final, room = round(density * size), sum(each.weight.numel() for each in chosen.values())
        allocation = Allocation(sparse_init, self._options.get("allocation"))
        if self.keep_connected or allocation.follows:
            check_followed("keep_connected" if self.keep_connected else f"`sparse_init` {sparse_init}", chosen)
        wanted, total = schedule.density(0) * size, _wanted(schedule, 0, final, room)
        drawn = draw(allocation, unwrap(module), chosen, wanted, total, shape, self.generator)
        self.density, self.sparse_init, self.schedule, self.input_shape = density, sparse_init, schedule, shape
        self.modules, self.theoretical_size, self._final, self._allocation = [module], size, final, allocation
        self._frozen = frozen
        for name, mask in distributed.from_rank_0(drawn).items():
            each = chosen[name]
            self._records[name] = MaskedWeight(name, each.weight, mask, each.blocks, each.uses)
        if weight_init == "sparse-fan-in":
            sparse_fan_in(self.weights, self.masks, self.generator, modules_of(unwrap(module)))
        self.apply_mask()
        attend(self)
        logger.info("%s of %s weights active (density %g)", self.nonzeros, self.theoretical_size, density)

    def remove_weight(self, name: str) -> None:
        """Stop masking the weight called `name` or `name.weight`; it trains densely from here on.

        The other layers keep their budgets, the removed one's goes with it. Raises `UsageError` for an unknown name.
        """
        name = self._full(name)
        budgets = self._budgets(self.density * self.theoretical_size, self._final)
        self._final -= sum(budgets[key] for key in self._records[name].keys)
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
        return sum(self._budgets_at(step).values())

    def _budgets_at(self, step: int) -> dict[str, int]:
        """Active weights that every matrix shall have at a step."""
        total = _wanted(self.schedule, step, self._final, sum(each.weight.numel() for each in self._records.values()))
        return self._budgets(self.schedule.density(step) * self.theoretical_size, total)

    # ------------------------------------------------------------------ stepping

    def step(self, closure: Callable | None = None, *, scaler: Any = None):
        """One optimizer step on the active weights, and the topology update where the schedule has one.

        `closure` is handed to the optimizer; `scaler` is a `torch.amp.GradScaler` (call its `update()` yourself,
        as ever). Returns what the optimizer's step returns.
        """
        self._module("step")
        self._stepped.check("host", self.optimizer)
        if scaler is not None:
            unscale(scaler, self.optimizer)
        due = self._due_next
        if due and scaler is not None and not all_finite(self._stepping.gradients().values()):
            due, self._put_off = False, True  # the scaler skips this step, whose gradients say nothing
        prepared = functools.partial(self._prepared, due, scaler is not None)
        self._in_step = True
        try:
            if closure is not None:
                result = self._stepping.with_closure(closure, prepared)
            else:
                with prepared():
                    result = self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        finally:
            self._in_step = False
        self._finish(due, "host")
        return result

    def _prepared(self, due: bool, skip_infinite: bool) -> contextlib.AbstractContextManager:
        """Around the optimizer's step. `skip_infinite`: a scaler may skip it because of gradients that overflowed."""
        self._track_momentum(skip_infinite)
        return self._stepping.prepared(due and "grad" in self.needs, self.engine)

    def _track_momentum(self, skip_infinite: bool) -> None:
        if "momentum" in self.needs:
            grads = self._stepping.gradients()
            if skip_infinite:
                grads = {name: grad.nan_to_num(0, 0, 0) for name, grad in grads.items()}
            accumulate(Column(self._records, "momentum"), grads, momentum_factor(self.optimizer))

    def _finish(self, due: bool, by: str) -> None:
        """All that follows the optimizer's step."""
        self.steps += 1
        self._decay_rate()
        if due:
            self._put_off = False
            with self._stepping.dense_gradients():
                self.truncate_weights()
                self.print_nonzero_counts()
        for plugin in self.plugins:
            plugin(self)
        self._tell_unfrozen()
        self._stepping.left(updated=due)
        self._stepped.note(by, self.optimizer)
        if self.engine is not None:
            self.engine.stepped()

    def before_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every step of any optimizer that is not made by `step()`."""
        if optimizer is self.optimizer and not self._in_step:
            self._stepped.check("optimizer", optimizer)
            self.packed.unpack()

    def after_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after it. A step of the host's own optimizer is taken as one of the host's, the update included;
        after one of another optimizer the weights that it holds are masked."""
        if self._in_step:
            return
        if optimizer is not self.optimizer:
            if held := self._stepping.held_by(optimizer):
                self._stepping.mask(held, optimizer)
            return
        due = self._due_next
        self._track_momentum(skip_infinite=False)
        self.apply_mask()
        self._finish(due, "optimizer")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `step()` steps. Another one can be set at any time; it begins with the state it has."""
        return self._stepping.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        state_names(optimizer)
        if self._records and not _holds(optimizer, self.weights.values()):
            raise UsageError("optimizer: it has none of the masked weights; is it another model's?")
        copies = self.packed.copies
        self.packed.unpack()
        self._stepping = Stepping(optimizer, self._records)
        self.packed.copies = copies
        self.apply_mask()

    def apply_mask(self) -> None:
        """Set inactive weights and their optimizer state to zero. Every step does so by itself where somebody else
        wrote to them."""
        self._stepping.mask(self._records.values())

    @torch.no_grad()
    def truncate_weights(self) -> None:
        """One topology update at the current step: prune, redistribute, grow; counts are exact afterwards.

        Gradient rules need the dense gradient: call it after `backward()`, or leave it to `step()`. Raises
        `UsageError` where the gradients were masked by a step already.
        """
        self._module("truncate_weights")
        self._check_dense_gradients()
        self._stepping.mask_what_others_wrote()
        records = list(self._records.values())
        before = [record.active for record in records]
        masks = {record.name: record.mask.clone() for record in records} if self.keep_connected else {}
        changes = self._changes()
        topology.update([change for parts in changes for change in parts], self._rules, self.generator)
        if self.keep_connected:
            self._reconnect([change.layer for parts in changes for change in parts], masks)
        gone = [~record.mask.view(-1)[active.flat] for record, active in zip(records, before, strict=True)]
        numbers = fetch([each.sum().view(1) for each in gone])
        for record, parts, active, dropped, n in zip(records, changes, before, gone, numbers, strict=True):
            record.count, record.dropped = sum(change.count for change in parts), int(n)
            record.fired |= record.mask
            for tensor in (record.weight.detach(), *state_tensors(self.optimizer, record.weight)):
                active.drop(tensor, dropped)
            self.packed.move(record.weight, record.active)
        self._stepping.masked.follow(self.masks)
        self._stepping.left(updated=True)

    def _changes(self) -> list[list[topology.Change]]:
        """What an update is to do with the blocks of every weight. Those that get no gradient stay, as far as the
        density lets them."""
        budgets = self._budgets_at(self.steps)
        rate = self.prune_rate if getattr(self.schedule, "replaces", True) else 0.0
        some = bool(self.needs) and any(record.weight.grad is not None for record in self._records.values())
        changes = []
        for record in self._records.values():
            seen = record.seen(self.generator, self.needs, some)
            still = not record.weight.requires_grad or (some and record.weight.grad is None)
            parts = zip(record.keys, seen, record.places(), strict=True)
            changes.append([topology.Change(each, at, budgets[key], 0.0 if still else rate) for key, each, at in parts])
        return changes

    def _reconnect(self, seen: Sequence[Layer], before: dict[str, Tensor]) -> None:
        """Bring what an update left off path back onto paths, by importance and by growth score."""
        assert self.input_shape is not None
        scores = {}
        for layer in seen:
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
            "momentum": dict(Column(self._records, "momentum")),
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
        if missing := {"masks", "steps"} - set(state):
            raise UsageError(f"load_state_dict: this is no host's state, it has no {' and no '.join(sorted(missing))}")
        masks = state["masks"]
        if wrong := set(masks) ^ set(self.masks) or {n for n in masks if masks[n].shape != self.masks[n].shape}:
            raise UsageError(f"the saved masks do not fit the model; layers that differ: {', '.join(sorted(wrong))}")
        fired, averages = state.get("fired_masks", {}), state.get("momentum", {})
        for name, record in self._records.items():
            record.mask.copy_(masks[name])
            record.fired.copy_(fired.get(name, record.mask))
            record.momentum = averages[name].to(record.weight.device, copy=True) if name in averages else None
        if state.get("decay") is not None:
            self.death_rate_decay.load_state_dict(state["decay"])
        elif hasattr(self.death_rate_decay, "get_dr"):  # ITOP's own classes only count
            for _ in range(state["steps"] - self.steps):
                self.death_rate_decay.step()
        self.allocation.take(state.get("drawn"))
        self.steps, self._put_off = state["steps"], state.get("put_off", False)
        self.prune_rate = state.get("death_rate", self.prune_rate)
        if "generator" in state:
            self.generator.set_state(state["generator"].cpu())
        self.apply_mask()

    def __getstate__(self) -> dict[str, Any]:
        self.packed.unpack()
        left_out = ("_rules", "_stepping", "_stepped", "engine")
        return {name: value for name, value in vars(self).items() if name not in left_out} | {"_by": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state.pop("_by")
        vars(self).update(state)
        self.engine, self._stepped = None, Stepped()
        self._bind_rules(*self._asked)
        self._stepping = Stepping(optimizer, self._records)
        self._stepping.left()
        attend(self)

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
            self._frequency = Constant(1.0, steps_between(steps)).frequency  # checked there
        elif "frequency" in getattr(self.schedule, "__dataclass_fields__", ()) and _replaces(self.schedule):
            self.schedule = dataclasses.replace(self.schedule, frequency=steps_between(steps))
        else:
            raise UsageError(f"prune_every_k_steps: a {type(self.schedule).__name__} schedule has its own update steps")

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        return Column(self._records, "momentum")[self._name_of(weight)]

    def get_gradient_for_weights(self, weight: Tensor) -> Tensor:
        (layer,) = self._records[self._name_of(weight)].seen(self.generator, {"grad"}, False)
        return layer.grad.clone()

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

    def _budgets(self, wanted: float, total: int) -> dict[str, int]:
        return self.allocation.budgets(blocks(self._records), wanted, total)

    def _check_dense_gradients(self) -> None:
        for name in self._records if "grad" in self.needs else ():
            if self._stepping.masked_already(name) or (self.engine and self.engine.holds_gradient(name)):
                raise UsageError(
                    f"truncate_weights: the gradient of {name} was masked by step() already; "
                    "call it after backward() and before step(), or use update_frequency"
                )

    def _tell_unfrozen(self) -> None:
        if trained := [name for name, weight in self._frozen.items() if weight.requires_grad]:
            logger.warning("weights are trained now that were frozen when masks were made, and stay dense: %s", trained)
            self._frozen = {}

    def _decay_rate(self) -> None:
        decay = self.death_rate_decay
        if hasattr(decay, "get_dr"):
            decay.step()
            self.prune_rate = decay.get_dr()
        elif decay is not None:
            self.prune_rate = decay(self.steps)


def _holds(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> bool:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(weight) in held for weight in weights)


def _replaces(schedule: Any) -> bool:
    """Whether updates of a schedule replace weights, at some time at least."""
    return getattr(schedule, "replaces", True) is not False


def _wanted(schedule: Any, step: int, final: int, room: int) -> int:
    """Active weights at a step, from those at the schedule's target and what there is room for."""
    return min(round(final * (schedule.density(step) / schedule.target)), room)
