"""Activations that stand in for ReLU, and their phase-out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn

from ...errors import UsageError
from .. import registry
from .phased import PhasedActivation, PhasedActivations, PhaseOut, attach

__all__ = ["PhaseOut", "PhasedActivation", "PhasedActivations", "attach", "factory"]

_DYRELU_TYPES = {kind: f"dyrelu-{kind}" for kind in "abc"}


def factory(name: str, **options) -> Callable[[int], nn.Module]:
    """The activation factory called `name`, with its options bound: `factory(name)(num_channels)` is a module.

    `name` is a registered activation, `module:factory`, or `a`, `b`, `c` for DyReLU of that type. Options that are
    None are left to the factory's default. Raises `UsageError` for an unknown name or option.
    """
    make = registry.activation.get(_DYRELU_TYPES.get(name.lower(), name))
    options = {option: value for option, value in options.items() if value is not None}
    try:
        inspect.signature(make).bind(1, **options)
    except TypeError as error:
        raise UsageError(f"activation {name!r} (`east_dyrelu_type`): {error}") from error
    return functools.partial(make, **options)
