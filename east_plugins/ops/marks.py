"""What EAST's own modules are to the rest of the package, as types: no attribute of a user's network, whatever its
name, is taken for a mark of ours."""

from __future__ import annotations

import contextlib

from torch import nn

from .swap import Swapped, swap


class Marked:
    """Mixed into the class of every module that a plugin changed or brought along."""

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the module computes as that of the network without the plugin does, in one plain operation."""
        return contextlib.nullcontext()


class PluginModule(Marked):
    """A module that a plugin brought along: it and all inside it are neither masked nor shared, and its weights are
    no part of the network's size."""


class _LeftOut(PluginModule, Swapped):
    """Mixed into the class of a module of somebody else's."""


def leave_out(module: nn.Module) -> None:
    """Make `module` a `PluginModule`, for example one that holds a fixed matrix."""
    if not isinstance(module, PluginModule):
        swap(module, _LeftOut)
