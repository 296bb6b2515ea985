"""What a host keeps of gradients from step to step: which of them it has masked, and their running averages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MaskedGradients:
    """Zeroes gradients of inactive weights in place, and knows which gradients it has zeroed."""

    def __init__(self):
        self._masked: dict[str, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def mask(self, grads: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Set the gradients to zero outside of the masks of the same names."""
        if grads and all(grad.is_cuda for grad in grads.values()):  # one call for all layers
            torch._foreach_mul_(list(grads.values()), [masks[name] for name in grads])
        else:
            for name, grad in grads.items():
                grad.masked_fill_(~masks[name], 0)
        self._masked |= {name: (grad, grad._version) for name, grad in grads.items()}

    def has_masked(self, name: str, grad: Tensor | None) -> bool:
        """Whether this very gradient was masked and not written to since."""
        masked, version = self._masked.get(name, (None, None))
        return masked is not None and grad is masked and masked._version == version


@torch.no_grad()
def accumulate(averages: dict[str, Tensor], grads: Mapping[str, Tensor], factor: float) -> None:
    """`average = factor * average + grad` in place, by name; an average that is missing starts at zero."""
    for name, grad in grads.items():
        if name not in averages:
            averages[name] = torch.zeros_like(grad)
    if grads:
        present = [averages[name] for name in grads]
        torch._foreach_mul_(present, factor)
        torch._foreach_add_(present, list(grads.values()))
