"""What others do to a host's weights: write to them, and step optimizers that hold them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from ..errors import UsageError
from .layers import MaskedWeight

#: Weights of a densely stepped layer on the CPU that are compared with what was left there: writes through `.data`
#: leave no other trace.
PROBED = 16


class Watch:
    """Finds weights and masks that somebody else wrote to, without waiting for a device.

    Writes are known by PyTorch's own counters (`copy_`, `load_state_dict`, arithmetic in place) and by where the
    numbers lie (`weight.data = ...`); those through `.data` or numpy by a few values, on the CPU.
    """

    def __init__(self, records: Mapping[str, MaskedWeight]):
        self._records = records
        self._stamps: dict[str, tuple[int, int]] = {}
        self._probes: dict[str, tuple[Tensor, Tensor]] = {}

    def left(self, names: Iterable[str] | None = None, probed: Iterable[str] = ()) -> None:
        """Note how weights are left, by default all; those `probed` by some of their values too."""
        self._stamps |= self._now(self._records if names is None else names)
        self._probes |= {name: self._probe(name) for name in probed if self._records[name].weight.is_cpu}

    def written(self) -> list[str]:
        """Names of the weights that are not as they were left, or whose mask is not."""
        now = self._now(self._records)
        changed = [] if now == self._stamps else [n for n, stamp in now.items() if self._stamps.get(n) != stamp]
        changed += [name for name, record in self._records.items() if record.rewritten]
        return changed or [
            name
            for name, (places, values) in self._probes.items()
            if name in self._records and not torch.equal(self._records[name].weight.detach().take(places), values)
        ]

    def _now(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        return {name: (weight._version, _where(weight)) for name in names for weight in [self._records[name].weight]}

    def _probe(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._records[name].weight.detach()
        if name in self._probes:
            places = self._probes[name][0]
        else:  # no random numbers of the script's or the host's
            places = torch.randint(weight.numel(), (PROBED,), generator=torch.Generator().manual_seed(0))
        return places, weight.take(places)


def _where(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.is_cpu else tensor.untyped_storage()._cdata


class Stepped:
    """The gradients that the last step was made with: another step with the same ones is one too many."""

    def __init__(self) -> None:
        self._mark: tuple[TensorWeakRef, int] | None = None
        self._by: str | None = None

    def check(self, by: str, optimizer: torch.optim.Optimizer) -> None:
        """Raise `UsageError` where somebody else than `by` stepped with these very gradients already."""
        grad = self._gradient(optimizer)
        if self._by not in (None, by) and grad is not None and self._mark is not None:
            seen, version = self._mark
            if seen() is grad and version == grad._version:
                raise UsageError(
                    "optimizer.step() and mask.step() were both called for the same gradients; "
                    "mask.step() steps the optimizer itself: call one of them"
                )

    def note(self, by: str, optimizer: torch.optim.Optimizer) -> None:
        grad = self._gradient(optimizer)
        self._by, self._mark = by, None if grad is None else (TensorWeakRef(grad), grad._version)

    def _gradient(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        parameters = (p for group in reversed(optimizer.param_groups) for p in reversed(group["params"]))
        return next((p.grad for p in parameters if p.grad is not None), None)


def attend(host: Any) -> None:
    """Have `host.before_step_of(optimizer)` and `host.after_step_of(optimizer)` called around every step of every
    optimizer of this process, for as long as the host lives."""
    known = weakref.ref(host)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (ours := known()) is not None:
            ours.before_step_of(optimizer)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (ours := known()) is not None:
            ours.after_step_of(optimizer)

    for handle in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
        weakref.finalize(host, handle.remove)
