"""Masking of gradients, in place."""

from __future__ import annotations

import torch
from torch import Tensor

#: Under this density the active gradients are gathered, which touches the mask's coordinates only.
GATHER_BELOW = 0.1


class GradientMask:
    """Zeroes gradients of inactive weights, and knows which gradients it has zeroed.

    It keeps the coordinates of active weights between calls, found anew whenever a mask was written to.
    """

    def __init__(self):
        self._coordinates: dict[str, tuple[Tensor, int, tuple[Tensor, ...]]] = {}
        self._masked: dict[str, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def apply(self, name: str, grad: Tensor, mask: Tensor, active: int) -> None:
        """Set `grad` to zero outside of `mask`, which has `active` entries."""
        if active == mask.numel():
            return
        if active < GATHER_BELOW * mask.numel():
            coordinates = self._active(name, mask)
            kept = grad[coordinates]
            grad.zero_()[coordinates] = kept
        else:
            grad.masked_fill_(~mask, 0)
        self._masked[name] = (grad, grad._version)

    def has_masked(self, name: str, grad: Tensor | None) -> bool:
        """Whether this very gradient was masked and not written to since."""
        masked, version = self._masked.get(name, (None, None))
        return masked is not None and grad is masked and grad._version == version

    def _active(self, name: str, mask: Tensor) -> tuple[Tensor, ...]:
        known, version, coordinates = self._coordinates.get(name, (None, None, ()))
        if known is not mask or version != mask._version:
            coordinates = mask.nonzero(as_tuple=True)
            self._coordinates[name] = (mask, mask._version, coordinates)
        return coordinates
