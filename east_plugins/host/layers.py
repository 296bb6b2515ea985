"""What a host keeps of the weights that it masks: a record each, and ITOP's dictionaries as views of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
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
        blocks: matrices that lie in it one below the other, each with a budget of its own.
        uses: layers of the model that compute with it.
        mask: boolean, True is active; of the weight's shape, and on its device.
        fired: boolean, active at least once so far.
        momentum: dense running average of gradients, where a rule needs it.
        average: running average of the prune rule's scores, zero where inactive, where that rule keeps one.
        mean_grad: mean of the dense gradients since a window before the next update began, where a rule needs it.
        memory: values with, where inactive, those that weights had when they were active or at first, where a rule
            needs them; up to date after `remember`.
        dropped: active weights that the last topology update dropped; None before the first.
    """

    def __init__(self, name: str, weight: nn.Parameter, mask: Tensor, blocks: int = 1, uses: int = 1):
        self.name, self.weight, self.blocks, self.uses = name, weight, blocks, uses
        self._mask = mask.to(weight.device, torch.bool)
        self.fired = self._mask.clone()
        self.momentum: Tensor | None = None
        self.average: Tensor | None = None
        self.mean_grad: Tensor | None = None
        self.memory: Tensor | None = None
        self.dropped: int | None = None
        self._counted: tuple[Tensor, int, int] | None = None
        self._found: tuple[Tensor, int, Active] | None = None
        self.written = False  #: whether somebody else than the host changed the mask since the weight was masked

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
        self._mask, self.written = mask.bool(), True

    @property
    def count(self) -> int:
        """Number of active weights. Counted, for which the host waits for the device, only where somebody else than
        the host wrote to the mask."""
        if self._counted is None or self._counted[0] is not self._mask or self._counted[1] != self._mask._version:
            self.count, self.written = int(self._mask.sum()), self._counted is not None
        assert self._counted is not None
        return self._counted[2]

    @count.setter
    def count(self, count: int) -> None:
        self._counted = self._mask, self._mask._version, count

    @property
    def rewritten(self) -> bool:
        """Whether somebody else changed the mask since the weight was masked."""
        _ = self.count  # looks at the mask
        return self.written

    @property
    def active(self) -> Active:
        """Positions of the active weights, found anew whenever the mask was replaced or written to."""
        mask = self.mask
        if self._found is None or self._found[0] is not mask or self._found[1] != mask._version:
            self._found = mask, mask._version, Active(mask, self.count)
        return self._found[2]

    @property
    def keys(self) -> list[str]:
        """Names of the blocks; the weight's own where it is one."""
        return block_names(self.name, self.blocks)

    def places(self) -> list[Tensor]:
        """Flat indices of the active weights of every block, counted from the block's first weight."""
        flat, size = self.active.flat, self.weight.numel() // self.blocks
        if self.blocks == 1:
            return [flat]
        return [flat[(flat >= i * size) & (flat < (i + 1) * size)] - i * size for i in range(self.blocks)]

    def seen(self, generator: torch.Generator, needs: Collection[str], some_have_gradients: bool) -> list[Layer]:
        """The blocks as rules see them: gradients are averaged over all ranks. Where `some_have_gradients` and this
        weight has none, its are zero."""
        weight, grad, average = self.weight.detach(), self.weight.grad, self.momentum
        none = weight.new_zeros(()).expand_as(weight) if some_have_gradients else None
        grad = (none if grad is None else distributed.mean(grad)) if "grad" in needs else None
        average = (none if average is None else distributed.mean(average)) if "momentum" in needs else None
        scores = self.average if "average" in needs else None
        scores = None if scores is None else distributed.mean(scores)
        mean = self.mean_grad if self.mean_grad is not None or self.weight.grad is not None else none
        mean = None if mean is None or "mean_grad" not in needs else distributed.mean(mean)
        memory = self.memory if "memory" in needs else None
        columns = map(self._split, (weight, self.mask, self.fired, grad, average, scores, mean, memory))
        return [
            Layer(key, each, mask, fired, generator, *rest)
            for key, each, mask, fired, *rest in zip(self.keys, *columns, strict=True)
        ]

    @torch.no_grad()
    def remember(self) -> None:
        """Take the active values into the memory, where there is one."""
        if self.memory is not None:
            self.memory.copy_(torch.where(self.mask, self.weight, self.memory))

    @torch.no_grad()
    def follow(self, rule: Any, generator: torch.Generator) -> None:
        """Take a step's scores of the active weights into the prune rule's running average; the first ones are it."""
        if self.weight.grad is None:
            return
        active, weight = self.active, self.weight.detach()
        values, grad = active.values(weight), active.values(self.weight.grad).nan_to_num(0, 0, 0)
        every = torch.ones_like(values, dtype=torch.bool)
        scores = rule.score(Layer(self.name, values, every, every, generator, grad))
        if self.average is None:
            self.average = active.spread(scores)
        else:
            active.put(self.average, active.values(self.average).lerp_(scores, 1 - rule.beta))

    def _split(self, tensor: Any) -> Sequence[Any]:
        return [tensor] * self.blocks if tensor is None or self.blocks == 1 else tensor.chunk(self.blocks)


def block_names(name: str, blocks: int) -> list[str]:
    """What the blocks of a weight are called in budgets."""
    return [name] if blocks == 1 else [f"{name}[{i}]" for i in range(blocks)]


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
