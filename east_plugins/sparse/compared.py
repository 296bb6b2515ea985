"""Which plans must be compared with the dense passes before they are used, and which are like those that agreed."""

from __future__ import annotations

from typing import Any

from torch import nn

from .modules import Kept, channels


class Compared:
    """A comparison costs more than a step, and a topology update makes new plans: not all of them are compared.

    They are where a layer is in a state (all of its channels kept, some or none) in which no plans of their kind were,
    and for the 1st, 2nd, 4th, 8th topology and so on.
    """

    def __init__(self) -> None:
        self._states: dict[Any, set[Any]] = {}  # by kind of plans
        self._topologies: dict[Any, int] = {}

    def must_be(self, kind: Any, kept: Kept) -> bool:
        """Whether the plans of a new topology, of this kind and with these channels, must be compared."""
        count = self._topologies[kind] = self._topologies.get(kind, 0) + 1
        return count & (count - 1) == 0 or not _states(kept) <= self._states.get(kind, set())

    def agreed(self, kind: Any, kept: Kept) -> None:
        """Plans of this kind with these channels gave the dense results."""
        self._states.setdefault(kind, set()).update(_states(kept))


def _states(kept: Kept) -> set[tuple[nn.Module, int, str]]:
    """Each layer's and norm's sides, and whether all, some or none of their channels are kept."""
    found = set()
    for module, sides in kept.items():
        for i, (some, every) in enumerate(zip(sides, channels(module), strict=True)):
            found.add((module, i, "none" if len(some) == 0 else "all" if len(some) == every else "some"))
    return found
