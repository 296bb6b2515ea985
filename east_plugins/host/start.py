"""How a host begins on a model: which weights it masks, how many are active, and which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.maskable import unwrap
from ..plugins.allocation.sample import Sample
from ..plugins.density import Constant, check_density
from ..plugins.protocols import Structure
from . import structured
from .budgets import Allocation, draw
from .choice import Chosen, Exclude, check_followed, choose
from .optimizer_state import holds
from .scaling import number
from .updating import wanted


@dataclass(frozen=True)
class Start:
    """What `add_module` of a host was given.

    Attributes:
        density: as given, checked.
        shape: (channels, height, width) of one input, where it was given.
        schedule: the density schedule.
        chosen: the weights to mask, by name.
        frozen: those that are frozen and left as they are.
        size: masked weights of the unshared network.
        final: active weights at the target density.
        allocation: how they are shared out.
        model: the model, without wrappers.
    """

    density: float
    shape: tuple[int, ...] | None
    schedule: Any
    chosen: dict[str, Chosen]
    frozen: dict[str, nn.Parameter]
    size: int
    final: int
    allocation: Allocation
    model: nn.Module

    @classmethod
    def of(
        cls,
        module: nn.Module,
        density: Any,
        sparse_init: tuple[str, Mapping[str, Any] | None, Structure | None],
        exclude: Exclude | Iterable[Exclude],
        input_shape: Sequence[int] | None,
        schedule: Any,
        keep_connected: bool,
        optimizer: torch.optim.Optimizer,
    ) -> Start:
        """Check what was given; `sparse_init` is the allocation's name, its options and the structure, `schedule` is
        one of densities, or the number of steps between updates at a constant one, or None. Raises `UsageError`, with
        nothing changed."""
        density = number("density", density)
        check_density(density)
        if keep_connected and input_shape is None:
            raise UsageError("keep_connected needs add_module(..., input_shape=(channels, height, width))")
        if sparse_init[0].lower() == "gmp":
            raise UsageError(
                "sparse_init GMP begins dense and prunes epoch by epoch: pass Masking(..., schedule=Gradual(density, "
                "initial=1.0, start=..., stop=..., frequency=...)) and another sparse_init"
            )
        allocation = Allocation(*sparse_init)
        chosen, frozen = choose(module, exclude)
        if not chosen:
            raise UsageError("the model has no conv or linear weights to mask" + " that are trained" * bool(frozen))
        if schedule is None or isinstance(schedule, int):
            schedule = Constant(density, schedule)
        if not math.isclose(schedule.target, density):
            raise UsageError(f"`density` {density:g} differs from the schedule's target {schedule.target:g}")
        if not holds(optimizer, (each.weight for each in chosen.values())):
            raise UsageError("the optimizer has none of the model's conv and linear weights: is it another model's?")
        structured.check_start(sparse_init[2], input_shape, schedule)
        _check_halves(optimizer, chosen)
        if keep_connected or allocation.follows:
            check_followed("keep_connected" if keep_connected else f"`sparse_init` {allocation.name}", chosen)
        elif structured.follows(sparse_init[2]):
            check_followed("`structure`", chosen)
        size = sum(each.uses * each.weight.numel() for each in chosen.values())
        shape = None if input_shape is None else tuple(input_shape)
        final = round(density * size)
        return cls(density, shape, schedule, chosen, frozen, size, final, allocation, unwrap(module))

    def masks(self, generator: torch.Generator, sample: Sample | None = None) -> dict[str, Tensor]:
        """Boolean masks, the same ones on every rank; `sample` are training data for allocations that look at them."""
        room = sum(each.weight.numel() for each in self.chosen.values())
        total, exact = wanted(self.schedule, 0, self.final, room), self.schedule.density(0) * self.size
        drawn = draw(self.allocation, self.model, self.chosen, exact, total, self.shape, generator, sample)
        return distributed.from_rank_0(drawn)


def _check_halves(optimizer: torch.optim.Optimizer, chosen: Mapping[str, Chosen]) -> None:
    """Adam divides by `eps` where a weight has had no gradient; in float16 the usual one is 0, and 0 / 0 is NaN."""
    halves = [name for name, each in chosen.items() if each.weight.dtype == torch.float16]
    smallest = min((group["eps"] for group in optimizer.param_groups if "eps" in group), default=1.0)
    if halves and torch.tensor(smallest, dtype=torch.float16) == 0:
        raise UsageError(
            f"optimizer {type(optimizer).__name__} with eps={smallest:g} makes NaN of inactive weights in float16 "
            f"({halves[0]}), where that eps is 0: keep the weights in float32 under autocast, or give eps=1e-7"
        )
