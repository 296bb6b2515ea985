"""Backward passes that cannot be differentiated again, which say so in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..errors import UsageError


def once(backward: Callable) -> Callable:
    """A `backward` of compiled kernels: raises `UsageError` where a gradient of its gradients is asked for."""
    inner = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise UsageError(
                "the sparse engine's gradients cannot be differentiated again (create_graph=True): "
                'use Engine(..., engine="dense") or engine.remove()'
            )
        return inner(ctx, *gradients)

    return checked
