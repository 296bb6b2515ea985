"""What a host keeps of the weights that it masks: a record each, and ITOP's dictionaries as views of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import distributed
from ..ops.active import Active
from ..plugins.protocols import Layer


class MaskedWeight:
    """One masked weight.

    Attributes:
        weight: the parameter, dense.
        mask: boolean, True is active; of the weight's shape, and on its device.
        fired: boolean, active at least once so far.
        momentum: dense running average of gradients, where a rule needs it.
        dropped: active weights that the last topology update dropped; None before the first.
    """

    def __init__(self, name: str, weight: nn.Parameter, mask: Tensor):
        self.name, self.weight = name, weight
        self._mask = mask.to(weight.device, torch.bool)
        self.fired = self._mask.clone()
        self.momentum: Tensor | None = None
        self.dropped: int | None = None
        self._counted: tuple[Tensor, int, int] | None = None
        self._found: tuple[Tensor, int, Active] | None = None

    @property
    def mask(self) -> Tensor:
        if self._mask.device != self.weight.device:  # a model may be moved after its masks were made
            count, self._mask = self.count, self._mask.to(self.weight.device)
            self.fired, self.count = self.fired.to(self.weight.device), count
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        if mask.shape != self.weight.shape:
            raise UsageError(f"mask of {self.name}: shape must be {list(self.weight.shape)}, got {list(mask.shape)}")
        self._mask = mask.bool()

    @property
    def count(self) -> int:
        """Number of active weights. Counted, for which the host waits for the device, only where somebody else than
        the host wrote to the mask."""
        if self._counted is None or self._counted[0] is not self._mask or self._counted[1] != self._mask._version:
            self.count = int(self._mask.sum())
        assert self._counted is not None
        return self._counted[2]

    @count.setter
    def count(self, count: int) -> None:
        self._counted = self._mask, self._mask._version, count

    @property
    def active(self) -> Active:
        """Positions of the active weights, found anew whenever the mask was replaced or written to."""
        mask = self.mask
        if self._found is None or self._found[0] is not mask or self._found[1] != mask._version:
            self._found = mask, mask._version, Active(mask, self.count)
        return self._found[2]

    def seen(self, generator: torch.Generator, needs_grad: bool) -> Layer:
        """The record as rules see it: gradients are averaged over all ranks."""
        grad, momentum = self.weight.grad if needs_grad else None, self.momentum
        return Layer(
            name=self.name,
            weight=self.weight.detach(),
            mask=self.mask,
            fired=self.fired,
            generator=generator,
            dense_grad=None if grad is None else distributed.mean(grad),
            dense_momentum=None if momentum is None else distributed.mean(momentum),
        )


class Column(MutableMapping[str, Any]):
    """One attribute of all records by the weights' names: a dictionary that is always up to date.

    Items can be read and assigned; what is None counts as missing. Copies and pickles are plain dictionaries.

    Args:
        records: the records by name, live.
        attribute: the attribute of theirs that is shown.
        remove: what `del` and `pop` of a name do; by default the attribute becomes None.
    """

    def __init__(
        self, records: Mapping[str, MaskedWeight], attribute: str, remove: Callable[[str], None] | None = None
    ):
        self._records, self._attribute, self._remove = records, attribute, remove

    def __getitem__(self, name: str) -> Any:
        value = getattr(self._records[name], self._attribute)
        if value is None:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._records:
            raise UsageError(f"{name!r} is not masked; known: {', '.join(self._records)}")
        setattr(self._records[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        self[name]  # a KeyError for what is missing
        if self._remove is None:
            setattr(self._records[name], self._attribute, None)
        else:
            self._remove(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, record in self._records.items() if getattr(record, self._attribute) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __reduce__(self) -> tuple:
        return OrderedDict, (), None, None, iter(self.items())
