"""EAST on hosts of other people: one adapter a host, one way to attach.

    attachment = attach(mask, EastOptions(cyclic=True), epochs=250, steps_per_epoch=352)

adds the tricks to a `Masking` of ITOP, sparse_learning, GraNet or ES2, a rigl-torch `RigLScheduler` or our own
`Masking` without editing its source. The host keeps its rules and its logging. `attachment.adapter` reads masks, fired
weights and step of any of them; `attachment.state_dict()` saves them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter
    from .attachment import Attachment, attach, connect
    from .length import Length

__all__ = ["Adapter", "Attachment", "Length", "attach", "connect"]

#: Public name to the module that it lies in.
_PUBLIC = {
    "Adapter": "adapter",
    "Attachment": "attachment",
    "Length": "length",
    "attach": "attachment",
    "connect": "attachment",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
