"""Where the active weights of a mask lie."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Active:
    """Positions of the active weights of one mask, in the order of the flattened mask.

    Attributes:
        flat: their positions in the flattened mask, ascending; int64 [active].
        shape: the mask's shape.
    """

    def __init__(self, mask: Tensor):
        self.flat = mask.flatten().nonzero().squeeze(1)
        self.shape = mask.shape

    def __len__(self) -> int:
        return len(self.flat)

    @functools.cached_property
    def coordinates(self) -> tuple[Tensor, ...]:
        """The same as one index a dimension, for tensors of any memory format."""
        return torch.unravel_index(self.flat, self.shape)

    def values(self, dense: Tensor) -> Tensor:
        """The active entries of a tensor of the mask's shape; [active]."""
        return dense[self.coordinates]

    def spread(self, values: Tensor) -> Tensor:
        """A tensor of the mask's shape with `values` at the active positions and zeros elsewhere."""
        dense = values.new_zeros(self.shape)
        dense[self.coordinates] = values
        return dense

    def moved(self, values: Tensor, to: Active) -> Tensor:
        """`values` at the positions of `to`: kept where a weight stays active, zero where it is new."""
        moved = values.new_zeros(len(to))
        if len(self) and len(to):
            at = torch.searchsorted(self.flat, to.flat).clamp_(max=len(self) - 1)
            stays = self.flat[at] == to.flat
            moved[stays] = values[at[stays]]
        return moved


class ActiveSets:
    """`Active` of masks by name, found anew whenever a mask was replaced or written to."""

    def __init__(self):
        self._known: dict[str, tuple[Tensor, int, Active]] = {}

    def of(self, name: str, mask: Tensor) -> Active:
        known, version, active = self._known.get(name, (None, None, None))
        if known is not mask or version != mask._version:
            active = Active(mask)
            self._known[name] = (mask, mask._version, active)
        return active
