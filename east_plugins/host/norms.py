"""Norms of a host's gradients, of active weights alone or of all, and clipping by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.maskable import unwrap
from .books import Books
from .layers import MaskedWeight

OF = ("active", "all")


def gradient_norm(
    parameters: Iterable[nn.Parameter],
    records: Mapping[str, MaskedWeight],
    of: str = "active",
    norm_type: float = 2.0,
    dense: Mapping[str, Tensor] = {},
) -> Tensor:
    """Norm of all gradients as one vector, without waiting for the device; of masked weights those of the active ones
    count, or `of` "all" of them: for those in `dense`, by name, the gradients there. Raises `UsageError` for another
    `of`."""
    if of not in OF:
        raise UsageError(f"of must be one of {', '.join(OF)}, got {of!r}")
    masked = {id(record.weight): record for record in records.values()} if of == "active" else {}
    instead = {id(records[name].weight): gradient for name, gradient in dense.items()} if of == "all" else {}
    grads = []
    for parameter in parameters:
        if parameter.grad is not None:
            record = masked.get(id(parameter))
            gradient = instead.get(id(parameter), parameter.grad)
            grads.append(gradient if record is None else record.active.values(gradient))
    return torch.nn.utils.get_total_norm(grads, norm_type)


class Clipping(Books):
    """The norm of a host's gradients, the same under every engine."""

    engine: Any

    def gradient_norm(self, of: str = "active", norm_type: float = 2.0) -> Tensor:
        """Norm of all gradients of the model as one vector: `of` the "active" weights (and what is not masked), or of
        "all", as a published script's own clipping counts them. The same with and without a sparse engine."""
        engine = self.engine
        dense = {} if engine is None else engine.dense_gradients()
        if (
            of == "all"
            and engine is not None
            and any(engine.holds_gradient(n) for n in self._records if n not in dense)
        ):
            raise UsageError(
                "the norm of all gradients needs dense ones, and the engine gave those of active weights only; "
                "set mask.reads_dense_gradients = True before the first step"
            )
        model = unwrap(self._module("gradient_norm"))
        return gradient_norm(model.parameters(), self._records, of, norm_type, dense)

    def clip_grad_norm_(self, max_norm: float, of: str = "active", norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` for the model, by `gradient_norm`; returns that norm, before clipping.

        Call it after `backward()` (with a gradient scaler, after `scaler.unscale_(optimizer)`).
        """
        norm = self.gradient_norm(of, norm_type)
        parameters = list(unwrap(self.modules[0]).parameters())
        if self.engine is not None:  # of active values only: the rest of such a gradient is zero
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # PyTorch's
            scaled = set(map(id, self.engine.scale_gradients(factor)))
            parameters = [parameter for parameter in parameters if id(parameter) not in scaled]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
