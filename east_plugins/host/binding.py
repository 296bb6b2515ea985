"""A rule as a host calls it: found by name or given as a function, its options filled in, its answers checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from ..plugins import registry
from ..plugins.protocols import Layer
from . import legacy


class Bound(NamedTuple):
    """Name of a rule, the rule as a function of layer and count, what it needs of the layer ("grad", ...), the plugin
    itself, and whether it scores each weight for itself."""

    name: str
    rule: Callable[[Layer, int], Tensor]
    needs: set[str]
    plugin: Any
    pointwise: bool


def bound(kind: str, spec: str | Callable[..., Any], host: Any, options: Mapping[str, Any] | None = None) -> Bound:
    """A rule that a host was given.

    `options` are the rule's own, where it is given by name.

    Raises `UnknownNameError` for an unknown name and `UsageError` for what is no function; the function raises
    `UsageError` for an answer that is not one score a weight (redistribution: one number).
    """
    if isinstance(spec, str):
        entry = registry.BY_KIND[kind].entry(spec)
        name, function, meta = entry.name, entry.bound(options), entry.meta
    else:
        name, function, meta = getattr(spec, "__name__", type(spec).__name__), spec, getattr(spec, "east_meta", {})
    if not callable(function):
        raise UsageError(f"{kind} rule {name} must be a function, is {type(function).__name__}")
    if legacy.is_legacy(kind, function):
        rule, needs = legacy.adapt(kind, function, host), {"grad", "momentum"}
    else:
        rule, needs = (lambda layer, count: function(layer)), set(meta.get("needs", ()))

    def checked(layer: Layer, count: int) -> Tensor:
        answer = rule(layer, count)
        if kind == "redistribution":
            right = isinstance(answer, (int, float)) or (isinstance(answer, Tensor) and answer.numel() == 1)
            wanted = "one number"
        else:
            right = isinstance(answer, Tensor) and answer.shape == layer.weight.shape
            wanted = f"one score for each of the {'x'.join(map(str, layer.weight.shape))} weights"
        if not right:
            found = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise UsageError(f"{kind} rule {name} returned {found} for layer {layer.name}, expected {wanted}")
        return torch.as_tensor(answer)

    return Bound(name, checked, needs, function, bool(meta.get("pointwise")))
