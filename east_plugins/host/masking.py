"""Our host: owns the masks of a model, keeps them through optimizer steps and updates their topology."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.active import Active, ActiveSets
from ..ops.maskable import layers, maskable, modules_of, theoretical_size, unwrap
from ..ops.select import fetch
from ..plugins.allocation.connected import reconnect
from ..plugins.density import Constant, check_density
from ..plugins.protocols import Layer
from . import topology
from .binding import bound
from .budgets import Allocation
from .gradients import MaskedGradients, accumulate, all_finite
from .itop import Surface
from .optimizer_state import momentum_factor, state_names, state_tensors
from .packed import PackedState
from .values import sparse_fan_in

logger = logging.getLogger(__name__)

#: Layers of a smaller active share are stepped packed on the CPU; all others dense with masked gradients, which on an
#: accelerator costs fewer operations and keeps a CUDA graph of a step valid when the topology changes.
PACK_BELOW = 0.1


class Masking(Surface):
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
        plugins: Sequence[Callable[[Masking], None]] = (),
    ):
        if growth_death_ratio != 1.0:
            raise UsageError(f"growth_death_ratio must be 1 (counts are exact), got {growth_death_ratio}")
        if prune_scope not in ("local", "global"):
            raise UsageError(f"--prune-scope must be local or global, got {prune_scope!r}")
        if not 0 <= death_rate <= 1:
            raise UsageError(f"--death-rate must be in [0, 1], got {death_rate}")
        state_names(optimizer)  # raises for an optimizer whose state is unknown
        self.optimizer = optimizer
        self.death_rate = death_rate
        self.death_rate_decay = death_rate_decay
        self.schedule = schedule
        self.keep_connected = keep_connected
        self.threshold = threshold
        self.args = args
        self.plugins = list(plugins)
        self.steps = 0
        self._put_off = False  # an update, from a step that a scaler skipped
        self.prune_every_k_steps = getattr(args, "update_frequency", update_frequency)
        if getattr(args, "fix", False):
            self.prune_every_k_steps = None

        self.growth_mode, grow, self.needs = bound("growth", growth_mode, self)
        self.death_mode, prune, needs = bound("pruning", death_mode, self)
        self.needs |= needs
        self.redistribution_mode, redistribute = "none", None
        if redistribution_mode != "none":
            self.redistribution_mode, redistribute, needs = bound("redistribution", redistribution_mode, self)
            self.needs |= needs
        self._rules = topology.Rules(grow, prune, redistribute, prune_scope)

        seed = torch.initial_seed() if seed is None else seed
        self.generator = torch.Generator().manual_seed(distributed.from_rank_0(seed) % 2**63)
        self.masks: dict[str, Tensor] = {}
        self.fired_masks: dict[str, Tensor] = {}
        self.weights: dict[str, nn.Parameter] = {}
        self.name2nonzeros: dict[str, int] = {}
        self.num_remove: dict[str, int] = {}
        self.modules: list[nn.Module] = []
        self.input_shape: tuple[int, ...] | None = None
        self._momentum: dict[str, Tensor] = {}
        self._active = ActiveSets()
        self.packed = PackedState(optimizer)
        self._masked_gradients = MaskedGradients()
        self.engine: Any = None  #: the sparse engine, where one is attached

    # ------------------------------------------------------------------ building

    def add_module(
        self,
        module: nn.Module,
        density: float = 0.05,
        sparse_init: str = "ERK",
        *,
        input_shape: Sequence[int] | None = None,
        weight_init: str = "default",
        allocation_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Mask all conv and linear weights of `module` at `density` of its theoretical (unshared) size.

        Args:
            density: active share of the unshared network's maskable weights, in (0, 1].
            sparse_init: allocation: ERK, ER, uniform, EPL, EPF, connected, ..., a registered name.
            input_shape: (channels, height, width) of one input, for `connected` and `keep_connected`.
            weight_init: `default` keeps the values, `sparse-fan-in` redraws them for the active fan-in.
            allocation_options: of `connected`: `budgets`, the allocation that gives each layer its number, and `width`.

        Raises `UsageError` for a second module (wrap both in one `nn.ModuleDict`), a density out of range, or one
        too small to give every layer a weight.
        """
        check_density(density)
        if self.modules:
            raise UsageError("add_module takes one module; wrap several in an nn.ModuleDict")
        if weight_init not in ("default", "sparse-fan-in"):
            raise UsageError(f"--weight-init must be default or sparse-fan-in, got {weight_init!r}")
        model = unwrap(module)
        weights = maskable(model)
        if not weights:
            raise UsageError("the model has no conv or linear weights to mask")
        if self.keep_connected and input_shape is None:
            raise UsageError("keep_connected needs add_module(..., input_shape=(channels, height, width))")
        schedule = self.schedule or Constant(density, self.prune_every_k_steps)
        if not math.isclose(schedule.target, density):
            raise UsageError(f"--density {density:g} differs from the schedule's target {schedule.target:g}")
        if not {id(p) for group in self.optimizer.param_groups for p in group["params"]} & {*map(id, weights.values())}:
            raise UsageError("the optimizer has none of the model's conv and linear weights: is it another model's?")
        shape = None if input_shape is None else tuple(input_shape)
        size = theoretical_size(model)
        final, room = round(density * size), sum(weight.numel() for weight in weights.values())
        allocation = Allocation(sparse_init, allocation_options)
        drawn = allocation.draw(model, weights, _wanted(schedule, 0, final, room), shape, self.generator)
        self.density, self.sparse_init, self.schedule, self.input_shape = density, sparse_init, schedule, shape
        self.weights, self.modules, self.theoretical_size, self._final = weights, [module], size, final
        self._allocation = allocation
        masks = distributed.from_rank_0(drawn)
        self._set_masks({name: mask.to(weights[name].device) for name, mask in masks.items()})
        if weight_init == "sparse-fan-in":
            sparse_fan_in(weights, self.masks, self.generator, modules_of(model))
        self.apply_mask()
        logger.info("%s of %s weights active (density %g)", self.nonzeros, self.theoretical_size, density)

    @property
    def nonzeros(self) -> int:
        """Number of active weights, from the host's own books: no device synchronisation."""
        return sum(self.name2nonzeros.values())

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
        return _wanted(self.schedule, step, self._final, sum(weight.numel() for weight in self.weights.values()))

    def remove_weight(self, name: str) -> None:
        """Stop masking the weight called `name` or `name.weight`; it trains densely from here on.

        The other layers keep their budgets, the removed one's goes with it. Raises `UsageError` for an unknown name.
        """
        name = name if name in self.masks else f"{name}.weight"
        if name not in self.masks:
            raise UsageError(f"remove_weight: {name!r} is not masked; known: {', '.join(self.masks)}")
        self._final -= self._allocation.budgets(self.weights, self._final)[name]
        uses = sum(module.weight is self.weights[name] for _, module in layers(unwrap(self.modules[0])))
        self.theoretical_size -= uses * self.weights[name].numel()
        for table in (self.masks, self.fired_masks, self.weights, self.name2nonzeros, self._momentum):
            table.pop(name, None)

    # ------------------------------------------------------------------ stepping

    def step(self, closure: Callable | None = None, *, scaler: Any = None):
        """One optimizer step on the active weights, and the topology update where the schedule has one.

        `closure` is handed to the optimizer; `scaler` is a `torch.amp.GradScaler` (call its `update()` yourself,
        as ever). Returns what the optimizer's step returns.
        """
        if not self.modules:
            raise UsageError("step: call add_module(model, density=...) first")
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        due = self._due_next
        if due and scaler is not None and not all_finite(self._gradients().values()):
            due, self._put_off = False, True  # the scaler skips this step, whose gradients say nothing
        elif due:
            self._put_off = False
        dense: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:

            def prepare() -> None:
                self._track_momentum(skip_infinite=scaler is not None)
                sets, masked = self._split()
                if due and "grad" in self.needs:
                    dense.update({name: self.weights[name].grad.clone() for name in masked})
                self._mask_gradients(masked)
                stack.enter_context(self.packed.stepping(sets))

            def prepared_closure():
                loss = closure()
                prepare()
                return loss

            if closure is not None:
                result = self.optimizer.step(prepared_closure)
            else:
                prepare()
                result = self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        self.steps += 1
        self._decay_rate()
        if due:
            for name, grad in dense.items():
                self.weights[name].grad = grad
            self.truncate_weights()
            self.print_nonzero_counts()
            self._mask_gradients(dense)
        for plugin in self.plugins:
            plugin(self)
        if self.engine is not None:
            self.engine.stepped()
        return result

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set inactive weights and their optimizer state to zero; needed only after somebody else changed them."""
        for name, weight in self.weights.items():
            mask = self._mask(name)
            for tensor in (weight, *state_tensors(self.optimizer, weight)):
                tensor.masked_fill_(~mask, 0)
            self.packed.move(weight, self.active(name))
        self._masked_gradients.follow(self.masks)

    @torch.no_grad()
    def truncate_weights(self) -> None:
        """One topology update at the current step: prune, redistribute, grow; counts are exact afterwards.

        Gradient rules need the dense gradient: call it after `backward()`, or leave it to `step()`. Raises
        `UsageError` where the gradients were masked by a step already.
        """
        self._check_dense_gradients()
        layers = [self._layer(name) for name in self.masks]
        old = [self.active(name) for name in self.masks]
        before = [layer.mask.clone() for layer in layers] if self.keep_connected else []
        budgets = self._allocation.budgets(self.weights, self.target_nonzeros(self.steps))
        counts = topology.update(
            layers,
            self._rules,
            [active.flat for active in old],
            [budgets[name] for name in self.masks],
            self.death_rate if getattr(self.schedule, "replaces", True) else 0.0,
            self.generator,
        )
        if self.keep_connected:
            self._reconnect(layers, before)
        gone = [~layer.mask.view(-1)[active.flat] for layer, active in zip(layers, old, strict=True)]
        numbers = fetch([each.sum().view(1) for each in gone])
        for layer, active, dropped, number, count in zip(layers, old, gone, numbers, counts, strict=True):
            self.name2nonzeros[layer.name] = count
            self.num_remove[layer.name] = int(number)
            self.fired_masks[layer.name] |= layer.mask
            weight = self.weights[layer.name]
            for tensor in (layer.weight, *state_tensors(self.optimizer, weight)):
                active.drop(tensor, dropped)
            self.packed.move(weight, self.active(layer.name))
        self._masked_gradients.follow(self.masks)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step, random state and running averages: all that a resumed run needs."""
        return {
            "masks": dict(self.masks),
            "fired_masks": dict(self.fired_masks),
            "momentum": dict(self._momentum),
            "steps": self.steps,
            "put_off": self._put_off,
            "death_rate": self.death_rate,
            "decay": self.death_rate_decay.state_dict() if hasattr(self.death_rate_decay, "state_dict") else None,
            "drawn": self._allocation.drawn,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in place; inactive weights are zeroed.

        Raises `UsageError` where the state's layers are not this model's.
        """
        masks = state["masks"]
        if wrong := set(masks) ^ set(self.masks) or {n for n in masks if masks[n].shape != self.masks[n].shape}:
            raise UsageError(f"the saved masks do not fit the model; layers that differ: {', '.join(sorted(wrong))}")
        self._set_masks(masks)
        for name, fired in state["fired_masks"].items():
            self.fired_masks[name].copy_(fired)
        self._momentum = {n: m.to(self.weights[n].device, copy=True) for n, m in state["momentum"].items()}
        if state["decay"] is not None:
            self.death_rate_decay.load_state_dict(state["decay"])
        elif hasattr(self.death_rate_decay, "get_dr"):  # ITOP's own classes only count
            for _ in range(state["steps"] - self.steps):
                self.death_rate_decay.step()
        self._allocation.take(state["drawn"])
        self.steps, self.death_rate, self._put_off = state["steps"], state["death_rate"], state["put_off"]
        self.generator.set_state(state["generator"].cpu())
        self.apply_mask()

    # ------------------------------------------------------------------ inside

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            if name in self.masks:
                self.masks[name].copy_(mask)
            else:
                self.masks[name] = mask.bool()
                self.fired_masks[name] = self.masks[name].clone()
            self.name2nonzeros[name] = int(mask.sum())

    def active(self, name: str) -> Active:
        """Positions of a layer's active weights."""
        return self._active.of(name, self._mask(name), self.name2nonzeros[name])

    def _mask(self, name: str) -> Tensor:
        """The mask, on the device that the weight is on by now."""
        weight = self.weights[name]
        if self.masks[name].device != weight.device:
            self.masks[name] = self.masks[name].to(weight.device)
            self.fired_masks[name] = self.fired_masks[name].to(weight.device)
        return self.masks[name]

    def _split(self) -> tuple[dict[nn.Parameter, Active | None], list[str]]:
        """The active set of each weight with a gradient, None where it is stepped densely, and the names of those
        whose gradients are to be masked for that."""
        sets, masked = {}, []
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            count, size = self.name2nonzeros[name], weight.numel()
            packed = count < PACK_BELOW * size and weight.device.type == "cpu"
            sets[weight] = self.active(name) if packed else None
            if not packed and count < size and not (self.engine and self.engine.masks_gradient(name)):
                masked.append(name)
        return sets, masked

    def _mask_gradients(self, names: Iterable[str]) -> None:
        masks = {name: self._mask(name) for name in names}
        self._masked_gradients.mask({name: self.weights[name].grad for name in masks}, masks)

    def _check_dense_gradients(self) -> None:
        for name, weight in self.weights.items():
            masked = self._masked_gradients.has_masked(name, weight.grad)
            if "grad" in self.needs and (masked or (self.engine and self.engine.holds_gradient(name))):
                raise UsageError(
                    f"truncate_weights: the gradient of {name} was masked by step() already; "
                    "call it after backward() and before step(), or use update_frequency"
                )

    def _gradients(self) -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}

    def _track_momentum(self, skip_infinite: bool) -> None:
        """`skip_infinite`: a scaler may skip this step because of gradients that overflowed."""
        if "momentum" in self.needs:
            grads = self._gradients()
            if skip_infinite:
                grads = {name: grad.nan_to_num(0, 0, 0) for name, grad in grads.items()}
            accumulate(self._momentum, grads, momentum_factor(self.optimizer))

    def _decay_rate(self) -> None:
        decay = self.death_rate_decay
        if hasattr(decay, "get_dr"):
            decay.step()
            self.death_rate = decay.get_dr()
        elif decay is not None:
            self.death_rate = decay(self.steps)

    def _layer(self, name: str) -> Layer:
        weight = self.weights[name]
        grad, momentum = weight.grad, self._momentum.get(name)
        return Layer(
            name=name,
            weight=weight.detach(),
            mask=self._mask(name),
            fired=self.fired_masks[name],
            generator=self.generator,
            dense_grad=None if grad is None or "grad" not in self.needs else distributed.mean(grad),
            dense_momentum=None if momentum is None else distributed.mean(momentum),
        )

    def _reconnect(self, layers: list[Layer], before: list[Tensor]) -> None:
        """Bring what an update left off path back onto paths, by importance and by growth score."""
        scores = {
            layer.name: torch.where(layer.mask | mask, self._rules.prune(layer, 0), self._rules.grow(layer, 0))
            for layer, mask in zip(layers, before, strict=True)
        }
        old = {layer.name: mask for layer, mask in zip(layers, before, strict=True)}
        reconnect(unwrap(self.modules[0]), self.masks, old, scores, self.input_shape, self.generator)


def _wanted(schedule: Any, step: int, final: int, room: int) -> int:
    """Active weights at a step, from those at the schedule's target and what there is room for."""
    return min(round(final * (schedule.density(step) / schedule.target)), room)
