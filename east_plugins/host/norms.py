"""Norms of a host's gradients, of active weights alone or of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import UsageError
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
