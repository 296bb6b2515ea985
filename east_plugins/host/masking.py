"""Our host: owns the masks of a model, keeps them through optimizer steps and updates their topology."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.maskable import modules_of, unwrap
from ..plugins.allocation.sample import Loss, Sample
from ..plugins.protocols import HostPlugin, Moment, Structure
from . import hooks, presets, structured
from .books import Books
from .choice import Exclude
from .gradients import MeanGradients, accumulate, all_finite
from .layers import Column, MaskedWeight
from .norms import Clipping
from .optimizer_state import holds, momentum_factor, state_names
from .pace import Pace
from .packed import PackedState
from .saved import Saved
from .scaling import skipped, unscale
from .start import Start
from .stepping import Stepping
from .updating import RuleSet, Updates
from .values import sparse_fan_in
from .watch import Stepped, attend

logger = logging.getLogger(__name__)


class Masking(Clipping, Saved):
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
        structure: how active weights lie in a layer: "none", a name in the registry, or an object as `Structure`.
        prune_scope: "local" (every layer drops its own share), "global" (a falling density drops the least important
            weights over all layers), or "all" (what is replaced is found over all layers, too).
        prune_rounding: "floor" or, as in ITOP, "ceil": the share of a layer that is replaced as a whole number.
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
        structure: str | Structure = "none",
        prune_scope: str = "local",
        prune_rounding: str = "floor",
        keep_connected: bool = False,
        seed: int | None = None,
        plugins: Sequence[HostPlugin] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        frequency = None if getattr(args, "fix", False) else getattr(args, "update_frequency", update_frequency)
        Books.__init__(self)
        Pace.__init__(self, schedule, frequency, death_rate, death_rate_decay)
        if growth_death_ratio != 1.0:
            raise UsageError(f"growth_death_ratio must be 1 (counts are exact), got {growth_death_ratio}")
        state_names(optimizer)  # raises for an optimizer whose state is unknown
        self.threshold, self.args = threshold, args
        self.keep_connected = keep_connected
        self.plugins = list(plugins)
        self.engine: Any = None  #: the sparse engine, where one is attached
        self.reads_dense_gradients = False  #: whether the script reads inactive weights' gradients at every step
        self._options = {kind: dict(values) for kind, values in (options or {}).items()}
        if death_mode == "threshold":
            self._options.setdefault("pruning", {}).setdefault("threshold", threshold)
        self._asked = growth_mode, death_mode, redistribution_mode, prune_scope, prune_rounding
        self.structure = structured.found(structure, self._options.get("structure"))
        structured.check(self.structure, redistribution_mode, prune_scope, keep_connected)
        self._bind_rules()

        seed = torch.initial_seed() if seed is None else seed
        self.generator = torch.Generator().manual_seed(distributed.from_rank_0(seed) % 2**63)
        self._stepping = Stepping(optimizer, self._records)
        self._stepped = Stepped()
        self._in_step = self._compared = False
        self._offered: dict[str, Tensor] | None = None

        # what add_module finds
        self.density, self.sparse_init = 0.0, ""
        self.batches: Iterable[Sequence[Tensor]] | None = None  #: training batches, where the script gave some
        self.input_shape: tuple[int, ...] | None = None
        self._built: Updates | None = None

    def _bind_rules(self) -> None:
        self._rules = RuleSet(*self._asked, host=self, options=self._options)
        self.growth_mode, self.death_mode, self.redistribution_mode = self._rules.names
        self.needs = self._rules.needs
        self._mean = MeanGradients(Column(self._records, "mean_grad"), self._rules.window)

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
        batches: Iterable[Sequence[Tensor]] | None = None,
        loss: Loss = F.cross_entropy,
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
            batches: pairs of training inputs and targets, such as a DataLoader, for allocations that look at the loss
                (`snip`, `grasp`, `force`, `iter_snip`).
            loss: `loss(output, target)`, the mean loss of a batch, for the same.

        Raises `UsageError` for a second module (wrap both in one `nn.ModuleDict`), a density out of range, one too
        small to give every layer a weight, and for layers whose weights cannot be masked.
        """
        if self.modules:
            raise UsageError("add_module takes one module; wrap several in an nn.ModuleDict")
        if weight_init not in ("default", "sparse-fan-in"):
            raise UsageError(f"`weight_init` must be default or sparse-fan-in, got {weight_init!r}")
        schedule = self._frequency if self.schedule is None else self.schedule
        asked = sparse_init, self._options.get("allocation"), self.structure
        start = Start.of(module, density, asked, exclude, input_shape, schedule, self.keep_connected, self.optimizer)
        sample = None if batches is None else Sample(batches, loss)
        masks = start.masks(self.generator, sample)
        self.density, self.sparse_init = start.density, sparse_init
        self.schedule, self.input_shape, self.batches = start.schedule, start.shape, batches
        self.modules, self._frozen = [module], start.frozen
        connected = (start.model, start.shape) if self.keep_connected and start.shape is not None else None
        self._built = Updates(self._records, start.allocation, start.final, self.generator, connected)
        for name, each in start.chosen.items():
            self._records[name] = MaskedWeight(name, each.weight, masks[name], each.blocks, each.uses)
            if "memory" in self.needs:
                self._records[name].memory = each.weight.detach().clone()
        if weight_init == "sparse-fan-in":
            sparse_fan_in(self.weights, self.masks, self.generator, modules_of(start.model))
        self.apply_mask()
        attend(self)
        hooks.begin(self.plugins, self)
        logger.info("%s of %s weights active (density %g)", self.nonzeros, start.size, start.density)

    def remove_weight(self, name: str) -> None:
        """Stop masking the weight called `name` or `name.weight`; it trains densely from here on.

        The other layers keep their budgets, the removed one's goes with it. Raises `UsageError` for an unknown name.
        """
        name = self._full(name)
        self._updates.forget(name)
        super().remove_weight(name)

    @property
    def dense_gradient_next(self) -> bool:
        """Whether the next step's dense gradient is scored by a rule, or read by the script."""
        scored = self.dense_gradient_due and self._offered is None
        return self.reads_dense_gradients or scored or self._due_within(self._mean.window)

    @property
    def update_due(self) -> bool:
        """Whether the next step has a topology update."""
        return self._due_next

    @property
    def dense_gradient_due(self) -> bool:
        """Whether the next step has a topology update by a rule that scores with the dense gradient."""
        return "grad" in self.needs and self._due_next

    def take_gradients(self) -> dict[str, Tensor]:
        """The weights' gradients since the last step, by name, dense where `dense_gradient_next`; none are left."""
        found = self._stepping.gradients()
        for record in self._records.values():
            record.weight.grad = None
        return found | ({} if self.engine is None else self.engine.take_gradients())

    def offer_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Give the rules of the topology update at the next step these gradients in place of the step's own: of a
        larger batch, or averaged over several."""
        self._offered = dict(gradients)

    def target_nonzeros(self, step: int) -> int:
        """Active weights that the schedule asks for at `step`: exactly `density(step) / target` times the count
        at the target, within what the (possibly shared) tensors can hold and one weight a layer; all at density 1."""
        return sum(self._updates.budgets_at(self.schedule, step).values())

    def is_at(self, step: int) -> bool:
        """Whether the active weights are those that the schedule asks for at `step`, or as many of them as a structure
        holds."""
        asked = self.target_nonzeros(step)
        return self.nonzeros == asked or (self.structure is not None and self.nonzeros < asked)

    @property
    def budgets(self) -> dict[str, int]:
        """Active weights of every masked weight at the schedule's target."""
        found = self._updates.budgets(self._updates.final / self._updates.size, self._updates.final)
        return {name: sum(found[key] for key in record.keys) for name, record in self._records.items()}

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
        self._track(skip_infinite)
        hooks.before_step(self.plugins, self, self._stepping)
        keep = due and "grad" in self.needs and self._offered is None
        return self._stepping.prepared(keep, self.engine)

    def _track(self, skip_infinite: bool) -> None:
        """Take the gradients into the averages that rules need."""
        if self._due_within(self._mean.window):
            dense = {} if self.engine is None else self.engine.dense_gradients()
            dense = {name: grad for name, grad in dense.items() if name in self._records}
            self._mean.take(self._stepping.gradients() | dense, skip_infinite)
        if "momentum" in self.needs:
            grads = self._stepping.gradients()
            if skip_infinite:
                grads = {name: grad.nan_to_num(0, 0, 0) for name, grad in grads.items()}
            accumulate(Column(self._records, "momentum"), grads, momentum_factor(self.optimizer))

    def _finish(self, due: bool, by: str) -> None:
        """All that follows the optimizer's step."""
        self._count_step()
        if "average" in self.needs:
            for record in self._records.values():
                record.follow(self._rules.pruner, self.generator)
        if due:
            self._put_off = False
            self._stepping.left()  # what the step wrote is masked: the update need not do it again
            offered, self._offered = self._offered, None
            with self._stepping.dense_gradients(offered):
                self.truncate_weights()
                self.print_nonzero_counts()
            self._mean.clear()
        if due or not self._compared:
            distributed.check_alike({name: record.active.flat for name, record in self._records.items()})
            self._compared = distributed.active()
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
            hooks.before_step(self.plugins, self, self._stepping)

    def after_step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after it. A step of the host's own optimizer is taken as one of the host's, the update included;
        after one of another optimizer the weights that it holds are masked."""
        if self._in_step or skipped(optimizer):
            return
        if optimizer is not self.optimizer:
            return self._stepping.mask_after(optimizer)
        due = self._due_next
        if due and "grad" in self.needs:
            self._stepping.keep_dense([], self.engine)
        self._track(skip_infinite=False)
        self.apply_mask()
        self._finish(due, "optimizer")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that `step()` steps. Another one can be set at any time; it begins with the state it has."""
        return self._stepping.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        state_names(optimizer)
        if self._records and not holds(optimizer, self.weights.values()):
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

    def truncate_weights(self) -> None:
        """One topology update at the current step: prune, redistribute, grow; counts are exact afterwards.

        Gradient rules need the dense gradient: call it after `backward()`, or leave it to `step()`. Raises
        `UsageError` where the gradients were masked by a step already.
        """
        budgets = self._updates.budgets_at(self.schedule, self.steps)
        if "grad" in self.needs:
            self._stepping.check_dense(self.engine)
        end = getattr(self.schedule, "end", math.inf)
        progress = min(self.steps / end, 1.0) if 0 < end < math.inf else None
        now = Moment(self.generator, progress, unwrap(self.modules[0]), self.input_shape)
        self._updates.update(self._rules, budgets, self._rate_now, self._stepping, self.structure, now)

    def removed_by(
        self, death_mode: str | Callable, death_rate: float, prune_scope: str = "local", **options: Any
    ) -> dict[str, Tensor]:
        """Masks of the weights that a prune rule would remove now, were `death_rate` of them replaced; nothing changes,
        the host's random state included. Rules that need the gradient see that of the last backward pass.

        Raises `UsageError` for a rule that averages over steps and is not the host's own.
        """
        growth, _, _, _, rounding = self._asked
        rules = RuleSet(growth, death_mode, "none", prune_scope, rounding, self, {"pruning": options})
        if "average" in rules.needs and rules.names[1] != self.death_mode:
            raise UsageError(f"`death_mode` {rules.names[1]} averages over steps: allowed is where the host follows it")
        generator = torch.Generator().set_state(self.generator.get_state())
        return self._updates.removed(rules, death_rate, generator)

    # ------------------------------------------------------------------ ITOP's and sparse_learning's names

    @property
    def name2prune_rate(self) -> dict[str, float]:
        return dict.fromkeys(self._records, self.prune_rate)

    def at_end_of_epoch(self) -> None:
        """sparse_learning's update once an epoch, for `prune_every_k_steps = None`; where `step` updates, nothing."""
        if self.prune_every_k_steps is None:
            self.truncate_weights()
            self.print_nonzero_counts()

    def truncate_weights_GMP(self, epoch: int) -> None:
        raise UsageError(
            "truncate_weights_GMP: pass Masking(..., schedule=Gradual(density, initial=1.0, start=..., stop=..., "
            "frequency=...)); step() prunes by it"
        )

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
