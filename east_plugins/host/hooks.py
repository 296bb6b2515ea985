"""What a host's plugins are asked beside the call at the end of every step, where they have a method for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..plugins.protocols import HostPlugin
from .stepping import Stepping


def begin(plugins: Iterable[HostPlugin], host: Any) -> None:
    """The masks are in place."""
    for plugin in plugins:
        if hasattr(plugin, "begin"):
            plugin.begin(host)


def before_step(plugins: Iterable[HostPlugin], host: Any, stepping: Stepping) -> None:
    """An optimizer step follows; plugins may change weights and gradients."""
    if waiting := [plugin.before for plugin in plugins if hasattr(plugin, "before")]:
        stepping.mask_what_others_wrote()
        for before in waiting:
            before(host)
        stepping.left()


def states(plugins: Iterable[HostPlugin]) -> list[Any]:
    """What each plugin wants saved; None for one that keeps nothing."""
    return [plugin.state_dict() if hasattr(plugin, "load_state_dict") else None for plugin in plugins]  # type: ignore[attr-defined]


def restore(plugins: Sequence[HostPlugin], saved: Sequence[Any]) -> None:
    """Give plugins back what `states` found."""
    for plugin, state in zip(plugins, saved, strict=False):
        if state is not None and hasattr(plugin, "load_state_dict"):
            plugin.load_state_dict(state)
