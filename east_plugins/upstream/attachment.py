"""EAST on somebody else's training: sharing, phased activations and cyclic density around the script's own host."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..ops import distributed
from ..ops.counts import apportion
from ..ops.maskable import maskable, theoretical_size, unwrap
from ..ops.swap import swap
from ..options.east import EastOptions, ResolvedEast
from ..plugins import activation as activations
from ..plugins.activation.phased import PhasedActivations
from ..plugins.activation.phased import attach as attach_activations
from ..plugins.density import Cyclic
from ..plugins.transform.sharing import hidden_scales, share
from . import checkpoints, hosts
from .adapter import Adapter
from .length import Length

logger = logging.getLogger(__name__)


class Attachment:
    """EAST on one model, its optimizer and, where the run has one, the host of its masks.

    Two moments matter. When the host is handed the model, weights are tied before the masks are made. At the first
    training step everything else is known (optimizer, learning-rate scheduler, loaders, the shape of an input):
    activations are attached then, so that no host masks them, and join an existing parameter group. Random numbers
    come from generators of their own, seeded by the script's seed.

    `finished` tells whether the network is at its target density and has plain ReLUs: what is tested must be.
    """

    def __init__(self, options: EastOptions):
        self.options = options
        self.adapter: Adapter | None = None
        self.model: nn.Module | None = None
        self.optimizer: Optimizer | None = None
        self.phased: PhasedActivations | None = None
        self.cycle: Cyclic | None = None
        self.borrowed = 0
        self.length: Length | None = None
        self.input_shape: tuple[int, ...] | None = None
        self.started = self.finished = False
        self.generator = torch.Generator()
        self._initial: dict[str, int] = {}  # active weights a layer, and of all at the target: known at the start
        self._target = 0
        self._finish: Callable[[], None] = lambda: None
        self._on_masks: tuple[Length | None, Sequence[int] | None] | None = None
        self._steps = 0

    @property
    def steps(self) -> int:
        return self.adapter.steps if self.adapter else self._steps

    # ------------------------------------------------------------------ attaching

    def connect(self, adapter: Adapter) -> Attachment:
        """Put EAST's moves around the methods of the adapter's host."""
        self.adapter, self.optimizer = adapter, adapter.optimizer
        swap(adapter.host, adapter.driven)
        adapter.host.east, adapter.host.east_adapter = self, adapter
        return self

    @property
    def books(self) -> Adapter:
        """The adapter of the host; raises `UsageError` for a run that has none."""
        if self.adapter is None:
            raise UsageError("EAST is attached to no host of masks: this run is dense or static")
        return self.adapter

    @contextlib.contextmanager
    def making_masks(self, module: nn.Module) -> Iterator[float]:
        """Around the host's making of its masks: ties weights first and hides EAST's own parameters meanwhile.

        Gives the factor by which the density of the tied tensors exceeds that of the unshared network, in which
        active weights are counted (EAST, Sec. 3.2).
        """
        model = unwrap(module)
        check_built_in(model, self.options)
        factor = self._share(model) if self.options.share else 1.0
        with hidden_scales(model):
            yield factor
        self.model = model
        if self._on_masks is not None:
            self.start(*self._on_masks)

    def start(self, length: Length | None, input_shape: Sequence[int] | None = None) -> None:
        """Everything else; cycles and activations need the length of the run, activations an input's shape.

        A host that has no masks yet starts when it makes them. Raises `UsageError`, with nothing changed, for
        whatever cannot be.
        """
        model, optimizer, adapter = self.model, self.optimizer, self.adapter
        if model is None or optimizer is None:
            self._on_masks = (length, input_shape)
            return
        self.length = length
        self.input_shape = None if input_shape is None else tuple(input_shape)
        options = self.options
        check_built_in(model, options)
        if distributed.active() and (options.dyrelu or options.share):
            raise UsageError("`east_dyrelu` and `east_share` work in one process only with a script of its own")
        if options.cyclic or options.dyrelu:
            self._follow_time(_known(length), model, optimizer)
        if options.share and not adapter:
            self._share(model)
        self.generator.manual_seed(torch.initial_seed() % 2**63)
        self.started = True
        if adapter:
            self._initial = {name: int(mask.sum()) for name, mask in adapter.masks.items()}
            self._target = adapter.target_nonzeros(self.borrowed)
            adapter.note_fired()
            adapter.begin(self)
        else:
            optimizer.register_step_post_hook(lambda *_: self.stepped())
        if self.cycle or self.phased:
            self._finish = checkpoints.watch(model, self)
        else:
            self.finished = True
        logger.info("%s", self._summary())

    def _follow_time(self, length: Length, model: nn.Module, optimizer: Optimizer) -> None:
        """Set up what changes over the run: cycles and activations."""
        options = self.options.resolve(length.epochs, length.steps_per_epoch, length.first_drop)
        if options.cyclic:
            self.cycle = self._cycle(options, length)
        if options.dyrelu:
            self.phased = self._activations(options, length, model)
            self.phased.join(optimizer)

    def _cycle(self, options: ResolvedEast, length: Length) -> Cyclic:
        if self.adapter is None:
            raise UsageError("`east_cyclic` needs a host of masks; this run is dense or static and builds none")
        self.adapter.check_cycles()
        if self.options.cyclic_update_frequency is None:
            frequency = max(options.cyclic_update_frequency, self.adapter.least_frequency)
            options = dataclasses.replace(options, cyclic_update_frequency=frequency)
        end = self.adapter.last_update(length.steps)
        schedule = options.density_schedule(self.adapter.density, length.steps_per_epoch, self.adapter.frequency, end)
        assert isinstance(schedule, Cyclic)
        return schedule

    def _activations(self, options: ResolvedEast, length: Length, model: nn.Module) -> PhasedActivations:
        if self.input_shape is None:
            raise UsageError("`east_dyrelu` needs a model that is called with one tensor, a batch of inputs")
        if options.dyrelu_end > length.epochs:
            raise UsageError(
                f"`east_dyrelu_end` {options.dyrelu_end:g} lies after the last of {length.epochs:g} epochs"
            )
        factory = activations.factory(options.dyrelu_type, reduction=options.dyrelu_reduction)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        phase_out = options.phase_out(length.steps_per_epoch)
        return attach_activations(
            model,
            factory,
            self.input_shape,
            phase_out=phase_out,
            generator=generator,
            blend=options.dyrelu_blend,
            late=options.dyrelu_late,
            replaces=options.dyrelu_replaced,
        )

    def _share(self, model: nn.Module) -> float:
        share(model, self.options.share_from, self.optimizer, self.options.share_scale or "one")
        unique = sum(weight.numel() for weight in maskable(model).values())
        self.borrowed = theoretical_size(model) - unique
        return 1 + self.borrowed / unique

    def _summary(self) -> str:
        host = f"{self.adapter.title} host" if self.adapter else "no host of masks"
        parts = [f"attached to {type(self.model).__name__}, {host}"]
        if self.borrowed:
            parts.append(f"{self.borrowed:,} weights shared")
        if self.cycle:
            bounds = ", ".join(map(str, self.cycle.bounds))
            parts.append(
                f"density {self.cycle.target:g} to {self.cycle.target * self.cycle.multiplier:g} in cycles "
                f"between steps {bounds}"
            )
        if self.phased and (span := self.phased.phase_out):
            parts.append(f"{len(self.phased.sites)} activations, phased out between steps {span.start} and {span.end}")
        return "; ".join(parts)

    # ------------------------------------------------------------------ stepping

    def frequency(self, step: int) -> int | None:
        """Steps between updates that the host is to believe in at `step`: 1 makes it update, None keeps it from it.
        Inside the cycles their schedule decides, afterwards the host itself."""
        if self.cycle is None or step > self.cycle.close:
            return self.books.frequency
        return 1 if self.cycle.due(step) else None

    @contextlib.contextmanager
    def resizing(self) -> Iterator[int | None]:
        """Around the host's own update: down to the schedule's count before it (else its magnitude pruning removes
        what has just been grown), to exactly that count after it. Gives the count, None without cycles."""
        if self.cycle is None:
            yield None
        else:
            budgets = self._budgets(self.cycle)
            self.books.resize(budgets, self.generator, grow=False)
            yield sum(budgets.values())
            self.books.resize(budgets, self.generator)
            logger.info("step %d: %d active weights, density %.6g", self.steps, *self._counted())
        self.books.note_fired()

    def _counted(self) -> tuple[int, float]:
        """Active weights, and what they are of the unshared network's."""
        masks, dense = self.books.masks.values(), self.books.dense
        active = sum(int(mask.sum()) for mask in masks) + dense
        return active, active / (sum(mask.numel() for mask in masks) + dense + self.borrowed)

    def _budgets(self, cycle: Cyclic) -> dict[str, int]:
        masks, density = self.books.masks, cycle.density(self.steps) / cycle.target
        total = round(self._target * density) - self.books.dense
        total = max(0, min(total, sum(mask.numel() for mask in masks.values())))
        if self.books.redistributes:
            share = [int(mask.sum()) for mask in masks.values()]
        else:
            share = [self._initial[name] for name in masks]
        lower = [min(1, count) for count in share]
        counts = apportion(share, total, lower, [mask.numel() for mask in masks.values()])
        return dict(zip(masks, counts, strict=True))

    def stepped(self) -> None:
        """After every step of the host, or of the optimizer where there is no host."""
        if not self.started:
            raise UsageError("EAST's flags had no effect: the model was trained without being called in training mode")
        self._steps += 1
        if self.phased:
            self.phased(self)
        if not self.finished and self._at_target():
            self.finished = True
            self._finish()
            reached = ["target density"] * bool(self.cycle) + ["plain ReLUs"] * bool(self.phased)
            logger.info("step %d: %s; checkpoints count from here on", self.steps, ", ".join(reached))

    def _at_target(self) -> bool:
        return (self.cycle is None or self.steps >= self.cycle.close) and (self.phased is None or self.phased.beta == 0)

    def shortfall(self) -> str:
        """Where a network that is not `finished` was left."""
        left = []
        if self.cycle and self.steps < self.cycle.close:
            left.append(f"density {self._counted()[1]:.2g} inside a cycle (target {self.cycle.target:g})")
        if self.phased and self.phased.beta > 0:
            left.append(f"activations at beta {self.phased.beta:.2g} (plain ReLUs at 0)")
        return f"the script ended at step {self.steps} of {_known(self.length).steps} with {' and '.join(left)}"

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step and prune rate of the host, and the state of the random choices."""
        return {**self.books.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.books.load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())


def check_built_in(model: nn.Module, options: EastOptions) -> None:
    """Raise `UsageError` where a network brings with it what the options would add: DyReLU, or ES2's weight sharing."""
    for name, module in model.named_modules():
        if options.dyrelu and type(module).__name__.startswith("DyReLU"):
            raise UsageError(f"`east_dyrelu`: the network has DyReLU of its own, {type(module).__name__} at {name}")
    shared = getattr(model, "get_shared_para", int)()
    if options.share and shared:
        raise UsageError(f"`east_share`: the network shares {shared:,} weights between its blocks by itself")


def _known(length: Length | None) -> Length:
    if length is None:
        raise UsageError("`east_cyclic` and `east_dyrelu` need the length of the run: epochs and steps_per_epoch")
    return length


# ------------------------------------------------------------------ to hosts


def connect(host: Any, options: EastOptions) -> Attachment:
    """EAST on a host, not yet started: `Attachment.start` follows when the run's length is known."""
    return Attachment(options).connect(hosts.adapter_for(type(host))(host))


def construct(host: Any, init: Callable[..., None], given: inspect.BoundArguments, options: EastOptions) -> Attachment:
    """Run a host's constructor `init` with the arguments `given` (the host among them), and connect EAST to it."""
    kind = hosts.adapter_for(type(host))
    attachment = Attachment(options)
    kind.construct(attachment, init, given)
    return attachment.connect(kind(host)) if attachment.adapter is None else attachment


def attach(
    host: Any,
    options: EastOptions,
    *,
    epochs: float,
    steps_per_epoch: int,
    input_shape: Sequence[int] | None = None,
    first_drop: float | None = None,
) -> Attachment:
    """Add EAST to an existing host, before its `add_module` or (but for sharing) after it.

    Args:
        options: which tricks, and their numbers; what is None is scaled from the paper's to the run.
        epochs, steps_per_epoch: length of the run.
        input_shape: of one input without the batch, for `dyrelu`.
        first_drop: epoch of the first learning-rate drop, at which the activations are gone.

    Raises `UsageError` for an unknown host and whatever the tricks cannot do with the model.
    """
    attachment = connect(host, options)
    if model := attachment.books.model:
        if options.share:
            raise UsageError("`east_share` ties weights before masks are made: attach to the host before add_module")
        attachment.model = model
    attachment.start(Length(epochs, steps_per_epoch, first_drop), input_shape)
    return attachment
