"""Modules of version 0.1 under the names that they had then, for one version, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

#: Former name to present name, both without the package's own.
MOVED = {
    "activations": "plugins.activation",
    "adapters": "upstream",
    "dct": "plugins.transform.dct",
    "itop": "host.itop",
    "launch": "upstream.launch",
    "layer": "plugins.protocols",
    "masking": "host.masking",
    "models": "training.models",
    "registry": "plugins.registry",
    "rules": "plugins",
    "runs": "training.runs",
    "schedules": "plugins",
    "sharing": "plugins.transform.sharing",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the present module for `package.former` and for every module below it."""

    def __init__(self, package: str):
        self.package = package

    def present(self, name: str) -> str | None:
        """The present name of a former module, None for any other."""
        package, _, rest = name.partition(".")
        first, _, below = rest.partition(".")
        if package != self.package or first not in MOVED:
            return None
        return ".".join(part for part in (package, MOVED[first], below) if part)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        present = self.present(name)
        if present is None or importlib.util.find_spec(present) is None:
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        present = self.present(name)
        assert present is not None
        warnings.warn(f"{name} is {present} now; the former name goes in the next version", DeprecationWarning, 2)
        sys.modules[name] = importlib.import_module(present)


def install(package: str) -> None:
    """Answer for the former names of `package`'s modules; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package))  # before the path: submodules are former ones too
