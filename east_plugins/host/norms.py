"""Norms of a host's gradients, of active weights alone or of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .layers import MaskedWeight

OF = ("active", "all")


def gradient_norm(
    parameters: Iterable[nn.Parameter], records: Mapping[str, MaskedWeight], of: str = "active", norm_type: float = 2.0
) -> Tensor:
    """Norm of all gradients as one vector, without waiting for the device; of masked weights those of the active ones
    count, or `of` "all" of them. Raises `UsageError` for another `of`."""
    if of not in OF:
        raise UsageError(f"of must be one of {', '.join(OF)}, got {of!r}")
    masked = {id(record.weight): record for record in records.values()} if of == "active" else {}
    grads = []
    for parameter in parameters:
        if parameter.grad is not None:
            record = masked.get(id(parameter))
            grads.append(parameter.grad if record is None else record.active.values(parameter.grad))
    return torch.nn.utils.get_total_norm(grads, norm_type)
