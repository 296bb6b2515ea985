"""EAST's tricks for extreme sparsity as plugins for dynamic sparse training in PyTorch.

Public names are found when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import former
from .errors import EastError, UsageError

if TYPE_CHECKING:
    from .host.itop import CosineDecay, LinearDecay, add_sparse_args
    from .host.masking import Masking
    from .options.config import Config
    from .options.east import EastOptions
    from .plugins.activation import factory
    from .plugins.activation.phased import PhaseOut, attach
    from .plugins.density import Cyclic
    from .plugins.protocols import Layer, option
    from .plugins.registry import (
        activation,
        allocation,
        companion,
        density,
        growth,
        pruning,
        rate,
        redistribution,
        structure,
        transform,
    )
    from .plugins.transform.dct.convert import convert, materialize
    from .plugins.transform.sharing import share
    from .sparse.engine import Engine
    from .training.compare import compare
    from .training.trainer import train
    from .upstream import launch

__version__ = "0.2.0.dev0"

#: Public name to the module that it lies in.
_PUBLIC = {
    "Config": "options.config",
    "CosineDecay": "host.itop",
    "Cyclic": "plugins.density",
    "EastOptions": "options.east",
    "Engine": "sparse.engine",
    "Layer": "plugins.protocols",
    "LinearDecay": "host.itop",
    "Masking": "host.masking",
    "PhaseOut": "plugins.activation.phased",
    "activation": "plugins.registry",
    "add_sparse_args": "host.itop",
    "allocation": "plugins.registry",
    "attach": "plugins.activation.phased",
    "companion": "plugins.registry",
    "compare": "training.compare",
    "convert": "plugins.transform.dct.convert",
    "density": "plugins.registry",
    "factory": "plugins.activation",
    "growth": "plugins.registry",
    "materialize": "plugins.transform.dct.convert",
    "option": "plugins.protocols",
    "pruning": "plugins.registry",
    "rate": "plugins.registry",
    "redistribution": "plugins.registry",
    "share": "plugins.transform.sharing",
    "structure": "plugins.registry",
    "train": "training.trainer",
    "transform": "plugins.registry",
}

__all__ = [
    "Config",
    "CosineDecay",
    "Cyclic",
    "EastError",
    "EastOptions",
    "Engine",
    "Layer",
    "LinearDecay",
    "Masking",
    "PhaseOut",
    "UsageError",
    "activation",
    "add_sparse_args",
    "allocation",
    "attach",
    "companion",
    "compare",
    "convert",
    "density",
    "factory",
    "growth",
    "launch",
    "materialize",
    "option",
    "pruning",
    "rate",
    "redistribution",
    "share",
    "structure",
    "train",
    "transform",
]

former.install(__name__)


def __getattr__(name: str) -> Any:
    if name == "launch":  # patched forks say `from east_plugins import launch as east`
        return importlib.import_module(".upstream.launch", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
