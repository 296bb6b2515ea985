"""Masks that a structure chooses, in place of the host's counting of single weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..ops.select import fetch
from ..plugins import registry
from ..plugins.protocols import Candidate, Moment, Structure
from .topology import Change, Rules


def found(spec: str | Structure, options: Mapping[str, Any] | None) -> Structure | None:
    """The structure of a name with its options, or the one that is given; None for "none"."""
    if isinstance(spec, str):
        return None if spec == "none" else registry.structure.bound(spec, options)
    if not (callable(getattr(spec, "start", None)) and callable(getattr(spec, "update", None))):
        raise UsageError(f"`structure` must have `start` and `update`, and {type(spec).__name__} has not")
    return spec


def check(structure: Structure | None, redistribution: Any, scope: str, keep_connected: bool) -> None:
    """Raise `UsageError` for what would choose masks beside a structure."""
    others = {"redistribution": redistribution != "none", "prune_scope": scope != "local"}
    for name in (name for name, on in {**others, "keep_connected": keep_connected}.items() if on):
        if structure is not None:
            raise UsageError(f"`structure` chooses the masks alone: allowed is no `{name}` beside it")


def follows(structure: Structure | None) -> bool:
    """Whether a structure knows the network and the length of the run."""
    return bool(getattr(structure, "follows", False))


def check_start(structure: Structure | None, input_shape: Sequence[int] | None, schedule: Any) -> None:
    """Raise `UsageError` where a structure does not find what it follows."""
    if not follows(structure):
        return
    if input_shape is None:
        raise UsageError("`structure` needs `input_shape`, the shape of one input without the batch")
    if getattr(schedule, "end", math.inf) == math.inf:
        raise UsageError("`structure` needs the length of the run: a density schedule with an `end`")


def update(changes: Sequence[Change], rules: Rules, structure: Structure, moment: Moment) -> None:
    """One update in place, chosen by the structure from what the rules say."""
    prune, grow = (functools.partial(_of_layer, rule) for rule in (rules.prune, rules.grow))
    candidates = [Candidate(each.layer, each.budget, each.rate, prune, grow, rules.whole) for each in changes]
    masks = structure.update(candidates, moment)
    for change, mask, count in zip(changes, masks, fetch([mask.sum().view(1) for mask in masks]), strict=True):
        change.layer.mask.copy_(mask.view_as(change.layer.mask))
        change.count = int(count)


def _of_layer(rule: Any, layer: Any) -> Any:
    return rule(layer, 0)
