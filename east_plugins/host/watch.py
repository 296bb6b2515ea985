"""What others do to a host's weights: write to them, and step optimizers that hold them."""

from __future__ import annotations

import functools
import itertools
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
        self._names: list[str] = []
        self._versions: list[int] = []
        self._memory: list[int] = []
        self._probes: dict[str, tuple[Tensor, Tensor]] = {}

    def left(self, names: Iterable[str] | None = None, probed: Iterable[str] = ()) -> None:
        """Note how weights are left, by default all; those `probed` by some of their values too."""
        now, versions, memory = list(self._records), *self._now()
        wanted = set(names or ())
        if names is not None and now == self._names:
            some = [name in wanted for name in now]
            versions = [a if is_new else b for is_new, a, b in zip(some, versions, self._versions, strict=True)]
            memory = [a if is_new else b for is_new, a, b in zip(some, memory, self._memory, strict=True)]
        self._names, self._versions, self._memory = now, versions, memory
        known = probed if names is None else wanted.intersection(self._probes)
        fresh = {n: self._probe(n) for n in known if n in self._records and self._records[n].weight.is_cpu}
        self._probes = fresh if names is None else self._probes | fresh

    def written(self, look_at_masks: bool = True) -> list[str]:
        """Names of the weights that are not as they were left, or whose mask is not."""
        versions, memory = self._now()
        changed: list[str] = []
        if versions != self._versions or memory != self._memory:
            left = dict(zip(self._names, zip(self._versions, self._memory, strict=True), strict=True))
            now = zip(self._records, versions, memory, strict=True)
            changed = [name for name, version, place in now if left.get(name) != (version, place)]
        if look_at_masks:
            changed += [name for name, record in self._records.items() if record.rewritten]
        return changed or [
            name
            for name, (places, values) in self._probes.items()
            if name in self._records and not torch.equal(self._records[name].weight.detach().take(places), values)
        ]

    def _now(self) -> tuple[list[int], list[int]]:
        """How often each weight was written to, and where its numbers lie."""
        weights = [record.weight for record in self._records.values()]
        on_cpu = all(weight.is_cpu for weight in weights)
        memory = [weight.data_ptr() if on_cpu else weight.untyped_storage()._cdata for weight in weights]
        return [weight._version for weight in weights], memory

    def _probe(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._records[name].weight.detach()
        if name in self._probes:
            places = self._probes[name][0]
        else:  # no random numbers of the script's or the host's
            places = torch.randint(weight.numel(), (PROBED,), generator=torch.Generator().manual_seed(0))
        return places, weight.take(places)


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


#: The hosts that are alive, oldest first. The hooks stay for good: one that came off when a host is collected, in the
#: middle of a step, would end that step with `OrderedDict mutated during iteration`.
_hosts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_number = itertools.count()


def attend(host: Any) -> None:
    """Have `host.before_step_of(optimizer)` and `host.after_step_of(optimizer)` called around every step of every
    optimizer of this process, for as long as the host lives."""
    _hook_optimizers()
    _hosts[next(_number)] = host


@functools.cache
def _hook_optimizers() -> None:
    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for host in list(_hosts.values()):
            host.before_step_of(optimizer)

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for host in list(_hosts.values()):
            host.after_step_of(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
