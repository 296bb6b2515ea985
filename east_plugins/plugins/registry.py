"""Plugins by name: built in, as `module:attribute`, or through an installed package's entry points."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from ..errors import DuplicateNameError, UnknownNameError, UsageError


@dataclass(frozen=True)
class Entry:
    """One registered plugin. `meta` holds what its registration declared, e.g. `needs=("grad",)`."""

    name: str
    object: Any
    help: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


class Registry:
    """Names of one kind of plugin.

    A look-up searches the built-in names, then entry points of group `east_plugins.<kind>`, then reads
    `module:attribute`. The module `builtin`, and every one in it where it is a package, is imported at the first
    look-up, so that registering needs no import in the other direction. Names are compared without regard to case
    and with `-` equal to `_`.
    """

    def __init__(self, kind: str, builtin: str | None = None):
        self.kind = kind
        self._builtin = builtin
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str, *, help: str | None = None, source: str | None = None, **meta) -> Callable:
        """Decorator that registers an object under `name`; `help` defaults to its docstring's first line.

        `meta` is added to the object's `east_meta`, so that it is known however the object is found. Raises
        `DuplicateNameError` where the name is another object's.
        """

        def add(obj):
            key = _key(name)
            known = self._entries.get(key)
            if known and known.object is not obj:
                raise DuplicateNameError(f"{self.kind} {name!r} is registered already by {known.source}")
            declared = {**getattr(obj, "east_meta", {}), **meta}
            if meta:
                with contextlib.suppress(AttributeError, TypeError):  # a built-in's, or a bound method's
                    obj.east_meta = declared
            self._entries[key] = _entry(name, obj, help, source, declared)
            return obj

        return add

    def entry(self, name: str) -> Entry:
        """The plugin called `name`; raises `UnknownNameError` with the nearest names, or `UsageError` where a
        `module:attribute` cannot be imported."""
        self._load()
        if found := self._entries.get(_key(name)):
            return found
        if ":" in name:
            return self._import(name)
        raise UnknownNameError(self.kind, name, self.names())

    def get(self, name: str) -> Any:
        """The registered object called `name`; raises as `entry`."""
        return self.entry(name).object

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """All plugins, sorted by name."""
        self._load()
        return sorted(self._entries.values(), key=lambda entry: entry.name.lower())

    def _load(self):
        if self._loaded:
            return
        if self._builtin is not None:
            package = importlib.import_module(self._builtin)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{self._builtin}.{module.name}")
        for point in entry_points(group=f"east_plugins.{self.kind}"):
            self.register(point.name, source=f"entry point {point.value}")(point.load())
        self._loaded = True

    def _import(self, spec: str) -> Entry:
        module, _, attribute = spec.partition(":")
        try:
            obj = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"{self.kind} {spec!r} cannot be imported: {reason}") from error
        declared = getattr(obj, "east_meta", {})
        return _entry(spec, obj, None, spec, declared)


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


def _entry(name: str, obj: Any, help: str | None, source: str | None, meta: dict) -> Entry:
    first_line = (inspect.getdoc(obj) or "").strip().split("\n", 1)[0]
    module = getattr(obj, "__module__", "?")
    return Entry(name, obj, first_line if help is None else help, source or f"{module}", meta)


def _builtin(kind: str) -> Registry:
    """The registry of a kind whose built-in plugins are the module, or the package, of the kind's own name."""
    return Registry(kind, f"{__package__}.{kind}")


growth = _builtin("growth")
pruning = _builtin("pruning")
redistribution = _builtin("redistribution")
allocation = _builtin("allocation")
density = _builtin("density")
rate = _builtin("rate")
activation = _builtin("activation")
transform = _builtin("transform")

ALL = (growth, pruning, redistribution, allocation, density, rate, activation, transform)
BY_KIND = {registry.kind: registry for registry in ALL}
