"""What a host keeps of gradients from step to step: which of them it has masked, and their running averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..ops.active import Active


class MaskedGradients:
    """Zeroes gradients of inactive weights in place, and knows which gradients it has zeroed.

    On CUDA all of them are multiplied in one operation, which needs masks of the gradients' own type and strides: they
    are kept, and written to in place, so that a captured CUDA graph of a step follows the topology.
    """

    def __init__(self):
        self._masked: dict[str, tuple[TensorWeakRef, int]] = {}
        self._factors: dict[str, _Factor] = {}

    @torch.no_grad()
    def mask(self, grads: Mapping[str, Tensor], masks: Mapping[str, Tensor], few: Mapping[str, Active]) -> None:
        """Set the gradients to zero outside of the masks of the same names. `few`: where so few are active that it is
        faster to put them back."""
        if grads and _at_once(grads):
            torch._foreach_mul_(list(grads.values()), self.factors(grads, masks))
        else:
            for name, grad in grads.items():
                if name in few:
                    values = few[name].values(grad)
                    few[name].put(grad.zero_(), values)
                else:
                    grad.masked_fill_(~masks[name], 0)
        self._masked |= {name: (TensorWeakRef(grad), grad._version) for name, grad in grads.items()}

    def factors(self, like: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[Tensor]:
        """The masks as tensors of ones and zeros that are like the tensors of the same names."""
        for name, tensor in like.items():
            factor = self._factors.get(name)
            if factor is None or not factor.fits(tensor):
                self._factors[name] = factor = _Factor(tensor)
            factor.follow(masks[name])
        return [self._factors[name].values for name in like]

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Bring what is kept of the masks up to date."""
        for name, factor in self._factors.items():
            if name in masks:
                factor.follow(masks[name])

    def has_masked(self, name: str, grad: Tensor | None) -> bool:
        """Whether this very gradient was masked and not written to since."""
        masked, version = self._masked.get(name, (None, None))
        return masked is not None and grad is masked() and grad._version == version


class _Factor:
    """A mask as ones and zeros."""

    def __init__(self, like: Tensor):
        self.values = torch.empty_like(like, requires_grad=False)
        self._mask: tuple[TensorWeakRef, int] | None = None

    def fits(self, tensor: Tensor) -> bool:
        ours = self.values
        return (ours.dtype, ours.device, ours.stride()) == (tensor.dtype, tensor.device, tensor.stride())

    def follow(self, mask: Tensor) -> None:
        if self._mask is None or self._mask[0]() is not mask or self._mask[1] != mask._version:
            self.values.copy_(mask)
            self._mask = TensorWeakRef(mask), mask._version


def _at_once(grads: Mapping[str, Tensor]) -> bool:
    return all(grad.is_cuda for grad in grads.values())


@torch.no_grad()
def accumulate(averages: MutableMapping[str, Tensor], grads: Mapping[str, Tensor], factor: float) -> None:
    """`average = factor * average + grad` in place, by name; an average that is missing starts at zero."""
    for name, grad in grads.items():
        if name not in averages:
            averages[name] = torch.zeros_like(grad)
    if grads:
        present = [averages[name] for name in grads]
        torch._foreach_mul_(present, factor)
        torch._foreach_add_(present, list(grads.values()))


class MeanGradients:
    """Means of the dense gradients of the last steps before a topology update.

    Attributes:
        window: of how many steps; 0 where nobody needs them.
        count: gradients taken since the last update.
    """

    def __init__(self, means: MutableMapping[str, Tensor], window: int):
        self._means, self.window, self.count = means, window, 0

    @torch.no_grad()
    def take(self, grads: Mapping[str, Tensor], skip_infinite: bool) -> None:
        """Take a step's gradients into the means; not those that a scaler skips."""
        if skip_infinite and not all_finite(grads.values()):
            return
        self.count += 1
        for name, grad in grads.items():
            if name in self._means:
                self._means[name].lerp_(grad, 1 / self.count)
            else:
                self._means[name] = grad.clone()

    def clear(self) -> None:
        self.count = 0
        self._means.clear()


def all_finite(grads: Collection[Tensor]) -> bool:
    """Whether no entry is infinite or NaN; waits for the device."""
    return not grads or bool(torch.stack([grad.isfinite().all() for grad in grads]).all())
