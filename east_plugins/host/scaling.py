"""Small things that scripts hand over in more ways than one: gradient scalers, and numbers as text."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError


def unscale(scaler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Bring gradients to their true size, where the script did not, as for clipping them."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "has already been called" not in str(error):
            raise


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that is just stepped by a scaler was told to change nothing: fused ones are called also
    where gradients overflowed. Waits for the device where such a scaler is there."""
    overflowed = getattr(optimizer, "found_inf", None)
    return overflowed is not None and bool(overflowed)


def number(name: str, value: Any) -> float:
    """A number, also as the text that YAML makes of `1e-3`; raises `UsageError` for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number, got {value!r}") from None


def steps_between(value: Any) -> int | None:
    """Steps between updates, None for none; raises `UsageError` for what is no whole number."""
    if value is None:
        return None
    steps = number("update_frequency", value)
    if not steps.is_integer():
        raise UsageError(f"update_frequency must be a whole number of steps, got {value!r}")
    return int(steps)
