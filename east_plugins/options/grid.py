"""The `grid` of a configuration file: lists of values for each setting, all combinations of which are runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UsageError

MOST_RUNS = 10_000  #: of one comparison

#: One product of lists, by the names of settings; `sparsity` is a name too.
Block = Mapping[str, Sequence[Any]]


def blocks(grid: Any, source: str) -> list[Block]:
    """The blocks of a file's `grid`: a mapping of keys to lists of values, or a list of such mappings, whose products
    are joined. A value that is no list is one of one. Raises `UsageError` naming `source` for what is no grid."""
    found: list[Block] = []
    for block in grid if isinstance(grid, list) else [grid]:
        if not isinstance(block, dict) or not block:
            raise UsageError(
                f"{source}: grid must hold keys and lists of values such as 'seed: [0, 1, 2]', got {block!r}"
            )
        values = {str(k).replace("-", "_"): v if isinstance(v, list) else [v] for k, v in block.items()}
        for key, some in values.items():
            if not some or any(value is None for value in some):
                raise UsageError(f"{source}: {key} of grid must be a list of values, got {some}")
            if twice := [value for i, value in enumerate(some) if value in some[:i]]:
                raise UsageError(f"{source}: {key} of grid must differ, got {twice[0]} twice")
        if {"density", "sparsity"} <= values.keys():
            raise UsageError(f"{source}: grid has density and sparsity; allowed is one of them")
        if "density" in values:
            try:
                values["sparsity"] = [round(1 - float(density), 12) for density in values.pop("density")]
            except (TypeError, ValueError):
                raise UsageError(f"{source}: density of grid must be numbers, got {block}") from None
        found.append(values)
    if not found:
        raise UsageError(f"{source}: grid is empty")
    if (count := sum(math.prod(map(len, block.values())) for block in found)) > MOST_RUNS:
        raise UsageError(f"{source}: grid has {count:,} runs, and the most of one comparison are {MOST_RUNS:,}")
    return found


def without(found: Sequence[Block], said: Iterable[str]) -> list[Block]:
    """Blocks less the settings that a file says which inherits them: what it says goes before its base's grid."""
    names = {"sparsity" if name == "density" else name for name in said}
    kept: list[Block] = []
    for block in found:
        left = {name: some for name, some in block.items() if name not in names}
        if left not in kept:
            kept.append(left)
    return kept if any(kept) else []


def varied(found: Sequence[Block], apart: Sequence[str]) -> list[str]:
    """The settings, but those `apart`, in which runs of the blocks differ, in the blocks' order."""
    names = [name for name in dict.fromkeys(name for block in found for name in block) if name not in apart]
    kinds = {name: [block.get(name, ()) for block in found] for name in names}
    return [name for name in names if len({str(value) for some in kinds[name] for value in some or [None]}) > 1]


def combinations(block: Block, apart: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of a block's values, of the settings but those `apart`."""
    names = [name for name in block if name not in apart]
    return [dict(zip(names, some, strict=True)) for some in itertools.product(*(block[name] for name in names))]


def single(found: Sequence[Block], given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings of a grid that is one run, those in `given` left open to them; raises `UsageError` where more than
    that has several values."""
    if not found:
        return {}
    if len(found) > 1:
        raise UsageError(f"{source} is a grid of several blocks of runs: it is run by compare")
    said = {*given, *(["sparsity"] if "density" in given else [])}
    values = {name: some for name, some in found[0].items() if name not in said}
    if many := [name for name, some in values.items() if len(some) > 1 and name != "seed"]:  # whose first one is it
        flags = ", ".join(f"`{'density' if name == 'sparsity' else name}`" for name in many)
        raise UsageError(f"{source} is a grid of runs: compare runs them all; for one of them choose {flags}")
    return as_settings({name: some[0] for name, some in values.items()})


def as_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the density in place of the sparsity."""
    found = {name: value for name, value in values.items() if name != "sparsity"}
    return found | ({"density": round(1 - float(values["sparsity"]), 12)} if "sparsity" in values else {})
