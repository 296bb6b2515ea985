"""Where the active weights of a mask lie."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .select import positions


class Active:
    """Positions of the active weights of one mask, in the order of the flattened mask.

    Attributes:
        flat: their positions in the flattened mask, ascending; int64 [active].
        shape: the mask's shape.
    """

    def __init__(self, mask: Tensor, count: int | None = None):
        """`count`, where the number of active weights is known, spares the host waiting for the device."""
        self.flat = mask.flatten().nonzero().squeeze(1) if count is None else positions(mask, count)
        self.shape = mask.shape
        self._places: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.flat)

    @functools.cached_property
    def coordinates(self) -> tuple[Tensor, ...]:
        """The same as one index a dimension, for tensors of any memory format."""
        found, rest = [], self.flat
        for size in reversed(self.shape[1:]):  # torch.unravel_index copies the shape to the device, and waits
            found.append(rest % size)
            rest = rest.div(size, rounding_mode="floor")
        return (rest, *reversed(found))

    def values(self, dense: Tensor) -> Tensor:
        """The active entries of a tensor of the mask's shape; [active]."""
        return dense.take(self.flat)

    def put(self, dense: Tensor, values: Tensor | float) -> None:
        """Write the active entries of a tensor of the mask's shape."""
        if isinstance(values, Tensor) and not torch.are_deterministic_algorithms_enabled():
            dense.put_(self.flat, values)  # refuses to be deterministic, though no position comes twice
        else:
            dense[self.coordinates] = values

    def places(self, dense: Tensor) -> Tensor:
        """Where the active entries lie in memory, counted from the tensor's first number; int64 [active]."""
        if dense.is_contiguous():
            return self.flat
        strides = dense.stride()
        if strides not in self._places:
            along = zip(self.coordinates, strides, strict=True)
            self._places[strides] = sum((axis * stride for axis, stride in along), torch.zeros_like(self.flat))
        return self._places[strides]

    def drop(self, dense: Tensor, gone: Tensor) -> None:
        """Set to zero the active entries of `dense` that are gone; `gone` is boolean, [active]."""
        self.put(dense, self.values(dense).masked_fill_(gone, 0))

    def spread(self, values: Tensor) -> Tensor:
        """A tensor of the mask's shape with `values` at the active positions and zeros elsewhere."""
        return values.new_zeros(self.shape.numel()).scatter_(0, self.flat, values).view(self.shape)

    def moved(self, values: Tensor, to: Active | All) -> Tensor:
        """`values` at the positions of `to`: kept where a weight stays active, zero where it is new."""
        if isinstance(to, All):
            return self.spread(values).view(-1)
        moved = values.new_zeros(len(to))
        if len(self) and len(to):
            at = torch.searchsorted(self.flat, to.flat).clamp_(max=len(self) - 1)
            stays = self.flat[at] == to.flat
            moved[stays] = values[at[stays]]
        return moved


class All:
    """All entries of tensors of one shape: `Active` of a mask of ones, without an index."""

    def __init__(self, shape: torch.Size):
        self.shape = shape

    def __eq__(self, other: object) -> bool:
        return isinstance(other, All) and self.shape == other.shape

    __hash__ = None  # type: ignore[assignment]  # Python's way to say so

    def __len__(self) -> int:
        return self.shape.numel()

    def moved(self, values: Tensor, to: Active | All) -> Tensor:
        """`values` at the positions of `to`."""
        return values if isinstance(to, All) else values[to.flat]

    def values(self, dense: Tensor) -> Tensor:
        return dense if dense.dim() == 1 else dense.reshape(-1)

    def places(self, dense: Tensor) -> Tensor | None:
        """None where the entries lie one after the other."""
        return None if dense.is_contiguous() else self._indexed.places(dense)

    def spread(self, values: Tensor) -> Tensor:
        return values.view(self.shape).clone()

    @functools.cached_property
    def _indexed(self) -> Active:
        return Active(torch.ones(self.shape, dtype=torch.bool))
