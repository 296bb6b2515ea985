"""EAST on somebody else's training: sharing, phased activations and cyclic density around the script's own host."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..host.masking import unwrap
from ..ops import distributed
from ..ops.counts import apportion
from ..ops.maskable import maskable, theoretical_size
from ..ops.swap import swap
from ..options.east import EastOptions
from ..plugins import activation as activations
from ..plugins.activation.phased import PhasedActivations
from ..plugins.activation.phased import attach as attach_activations
from ..plugins.density import Cyclic
from ..plugins.transform.sharing import hidden_scales, share
from . import checkpoints
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
        self.started = self.finished = False
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
        adapter.host.east = self
        return self

    @contextlib.contextmanager
    def making_masks(self, module: nn.Module) -> Iterator[float]:
        """Around the host's making of its masks: ties weights first and hides EAST's own parameters meanwhile.

        Gives the factor by which the density of the tied tensors exceeds that of the unshared network, in which
        active weights are counted (EAST, Sec. 3.2).
        """
        model = unwrap(module)
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
        if self.adapter and self.model is None:
            self._on_masks = (length, input_shape)
            return
        options, self.length = self.options, length
        if length is not None:
            options = options.resolve(length.epochs, length.steps_per_epoch, length.first_drop)
        if distributed.active() and (options.dyrelu or options.share):
            raise UsageError("--east-dyrelu and --east-share work in one process only with a script of its own")
        if options.cyclic:
            self.cycle = self._cycle(options, length)
        if options.dyrelu:
            self._attach_activations(options, length, input_shape)
        if options.share and not self.adapter:
            self._share(self.model)
        self.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        self.started = True
        if self.adapter:
            self._initial = {name: int(mask.sum()) for name, mask in self.adapter.masks.items()}
            self._target = self.adapter.target_nonzeros(self.borrowed)
            self.adapter.note_fired()
            self.adapter.begin(self)
        else:
            self.optimizer.register_step_post_hook(lambda *_: self.stepped())
        if self.cycle or self.phased:
            self._finish = checkpoints.watch(self)
        else:
            self.finished = True
        logger.info("%s", self._summary())

    def _cycle(self, options: EastOptions, length: Length) -> Cyclic:
        if self.adapter is None:
            raise UsageError("--east-cyclic needs a host of masks; this run is dense or static and builds none")
        self.adapter.check_cycles()
        if self.options.cyclic_update_frequency is None:
            frequency = max(options.cyclic_update_frequency, self.adapter.least_frequency)
            options = dataclasses.replace(options, cyclic_update_frequency=frequency)
        end = self.adapter.last_update(length.steps)
        return options.density_schedule(self.adapter.density, length.steps_per_epoch, self.adapter.frequency, end)

    def _attach_activations(self, options: EastOptions, length: Length, input_shape: Sequence[int] | None) -> None:
        if input_shape is None:
            raise UsageError("--east-dyrelu needs a model that is called with one tensor, a batch of inputs")
        if options.dyrelu_end > length.epochs:
            raise UsageError(
                f"--east-dyrelu-end {options.dyrelu_end:g} lies after the last of {length.epochs:g} epochs"
            )
        factory = activations.factory(options.dyrelu_type, reduction=options.dyrelu_reduction)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        phase_out = options.phase_out(length.steps_per_epoch)
        self.phased = attach_activations(self.model, factory, input_shape, phase_out=phase_out, generator=generator)
        self.phased.join(self.optimizer)

    def _share(self, model: nn.Module) -> float:
        share(model, self.options.share_from, self.optimizer)
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
        if self.phased:
            span = self.phased.phase_out
            parts.append(f"{len(self.phased.sites)} activations, phased out between steps {span.start} and {span.end}")
        return "; ".join(parts)

    # ------------------------------------------------------------------ stepping

    def frequency(self, step: int) -> int | None:
        """Steps between updates that the host is to believe in at `step`: 1 makes it update, None keeps it from it.
        Inside the cycles their schedule decides, afterwards the host itself."""
        if self.cycle is None or step > self.cycle.close:
            return self.adapter.frequency
        return 1 if self.cycle.due(step) else None

    @contextlib.contextmanager
    def resizing(self) -> Iterator[int | None]:
        """Around the host's own update: down to the schedule's count before it (else its magnitude pruning removes
        what has just been grown), to exactly that count after it. Gives the count, None without cycles."""
        if self.cycle is None:
            yield None
        else:
            budgets = self._budgets()
            self.adapter.resize(budgets, self.generator, grow=False)
            yield sum(budgets.values())
            self.adapter.resize(budgets, self.generator)
            logger.info("step %d: %d active weights, density %.6g", self.steps, *self._counted())
        self.adapter.note_fired()

    def _counted(self) -> tuple[int, float]:
        """Active weights, and what they are of the unshared network's."""
        masks = self.adapter.masks.values()
        active = sum(int(mask.sum()) for mask in masks) + self.adapter.dense
        return active, active / (sum(mask.numel() for mask in masks) + self.adapter.dense + self.borrowed)

    def _budgets(self) -> dict[str, int]:
        masks, density = self.adapter.masks, self.cycle.density(self.steps) / self.cycle.target
        total = round(self._target * density) - self.adapter.dense
        total = max(0, min(total, sum(mask.numel() for mask in masks.values())))
        if self.adapter.redistributes:
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
        return f"the script ended at step {self.steps} of {self.length.steps} with {' and '.join(left)}"

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step and prune rate of the host, and the state of the random choices."""
        return {**self.adapter.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.adapter.load_state_dict(state)
        self.generator.set_state(state["generator"].cpu())
