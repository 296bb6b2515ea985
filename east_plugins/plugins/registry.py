"""Plugins by name: built in, as `module:attribute`, or through an installed package's entry points."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar, overload

from ..errors import DuplicateNameError, UnknownNameError, UsageError
from . import protocols
from .protocols import options_of

logger = logging.getLogger(__name__)

P = TypeVar("P")
C = TypeVar("C")


#: `module:attribute` names that the user of this process gave himself, or that were looked up at his word.
_trusted: set[str] = set()
_of_a_file: ContextVar[bool] = ContextVar("names come from a file", default=False)


def trust(names: Iterable[str | None]) -> None:
    """Say that the user himself names these plugins: a file that is read later may name them too."""
    _trusted.update(name for name in names if name)


@contextlib.contextmanager
def names_of_a_file() -> Iterator[None]:
    """In the block, names come from a file that anybody may have written: of `module:attribute` only those are imported
    that the user named himself (`trust`). Built-in and installed plugins are found as always."""
    token = _of_a_file.set(True)
    try:
        yield
    finally:
        _of_a_file.reset(token)


def of_a_file() -> bool:
    """Whether names come from a file that anybody may have written."""
    return _of_a_file.get()


@dataclass(frozen=True)
class Entry:
    """One registered plugin. `meta` holds what its registration declared, e.g. `needs=("grad",)`."""

    name: str
    object: Any
    help: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> tuple[dataclasses.Field[Any], ...]:
        """The plugin's own options; none where it is a plain function."""
        return options_of(self.object)

    def bound(self, values: Mapping[str, Any] | None = None) -> Any:
        """The plugin with its options set: what is called.

        An instance of a plugin that is a dataclass; where that class needs more than its options (a schedule its
        target), the class with the options bound. Raises `UsageError` for an option that the plugin does not have.
        """
        values = dict(values or {})
        if unknown := [name for name in values if name not in {field.name for field in self.options}]:
            raise UsageError(f"{self.name} has no option {unknown[0]!r}; {self._known_options()}")
        if not (isinstance(self.object, type) and dataclasses.is_dataclass(self.object)):
            return self.object
        required = (f for f in dataclasses.fields(self.object) if f.init)
        if any(f.default is f.default_factory is dataclasses.MISSING for f in required):
            return functools.partial(self.object, **values) if values else self.object
        return self.object(**values)

    def _known_options(self) -> str:
        return f"its options: {', '.join(f.name for f in self.options)}" if self.options else "it has none"


class Registering(Protocol[P]):
    """The decorator that `register` returns; a class may be registered in place of its instances."""

    @overload
    def __call__(self, obj: type[C], /) -> type[C]: ...
    @overload
    def __call__(self, obj: P, /) -> P: ...


class Registry(Generic[P]):
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
        self._broken: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str, *, help: str | None = None, source: str | None = None, **meta: Any) -> Registering[P]:
        """Decorator that registers an object under `name`; `help` defaults to its docstring's first sentence.

        `meta` is added to the object's `east_meta`, so that it is known however the object is found. Raises
        `DuplicateNameError` where the name is another object's, and `UsageError` for a need that no host meets.
        """
        if unknown := [need for need in meta.get("needs", ()) if need not in protocols.NEEDS]:
            raise UsageError(f"{self.kind} {name!r} needs {unknown[0]!r}; allowed are {', '.join(protocols.NEEDS)}")

        def add(obj: Any) -> Any:
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
            if _of_a_file.get() and name not in _trusted:
                raise UsageError(
                    f"{self.kind} {name!r} stands in a file that is read, and nothing is imported on a file's word; "
                    "allowed are built-in and installed plugins, and what is named by hand"
                )
            found = self._import(name)
            trust([name])
            return found
        if reason := self._broken.get(_key(name)):
            raise UsageError(f"{self.kind} {name!r} {reason}")
        raise UnknownNameError(self.kind, name, self.names())

    def get(self, name: str) -> Any:
        """The registered object called `name`; raises as `entry`."""
        return self.entry(name).object

    def bound(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """The plugin called `name` with its options set; raises as `entry` and `Entry.bound`."""
        return self.entry(name).bound(options)

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """All plugins, sorted by name."""
        self._load()
        return sorted(self._entries.values(), key=lambda entry: entry.name.lower())

    def _load(self) -> None:
        if self._loaded:
            return
        if self._builtin is not None:
            package = importlib.import_module(self._builtin)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{self._builtin}.{module.name}")
        self._loaded = True
        for point in entry_points(group=f"east_plugins.{self.kind}"):
            self._add(point)

    def _add(self, point: EntryPoint) -> None:
        """Take up an entry point; one that cannot be loaded is somebody else's fault, and stops nothing here."""
        source = f"entry point {point.value}"
        try:
            self.register(point.name, source=source)(point.load())
        except Exception as error:  # whatever the other package raises
            self._broken[_key(point.name)] = reason = f"({source}) cannot be loaded: {_one_line(error)}"
            logger.warning("%s %r %s", self.kind, point.name, reason)

    def _import(self, spec: str) -> Entry:
        module, _, attribute = spec.partition(":")
        try:
            obj = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises
            raise UsageError(f"{self.kind} {spec!r} cannot be imported: {_one_line(error)}") from error
        if reason := _misfit(obj, self.kind):
            raise UsageError(f"{self.kind} {spec!r} {reason}")
        declared = getattr(obj, "east_meta", {})
        return _entry(spec, obj, None, spec, declared)


#: Kinds whose functions are called with one argument and nothing else.
_CALLED_WITH_ONE = ("growth", "pruning", "redistribution", "activation")


def _misfit(obj: Any, kind: str) -> str | None:
    """Why an object is no plugin of its kind, as far as it can be told without calling it."""
    if not callable(obj):
        return f"is no {kind} plugin: it must be a function, or a class whose instances are called"
    if inspect.isbuiltin(obj) or _module(obj).split(".")[0] in sys.stdlib_module_names:
        return f"is Python's own and no {kind} plugin; allowed are functions and classes written for it"
    if kind in _CALLED_WITH_ONE and inspect.isfunction(obj):
        try:
            inspect.signature(obj).bind(None)
        except TypeError as error:
            return f"cannot be called as a {kind} plugin, with one argument: {error}"
    return None


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _entry(name: str, obj: Any, help: str | None, source: str | None, meta: dict[str, Any]) -> Entry:
    return Entry(name, obj, _first_sentence(obj) if help is None else help, source or _module(obj), meta)


def _module(obj: Any) -> str:
    return str(getattr(obj, "__module__", "?"))


def _first_sentence(obj: Any) -> str:
    """Of a docstring's first paragraph; abbreviations such as `et al.` go on in small letters or figures."""
    paragraph = " ".join((inspect.getdoc(obj) or "").strip().split("\n\n", 1)[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph, maxsplit=1)[0]


def _builtins(kind: str) -> Registry[Any]:
    """The registry of a kind whose built-in plugins are the module, or the package, of the kind's own name."""
    return Registry(kind, f"{__package__}.{kind}")


growth: Registry[protocols.GrowthRule] = _builtins("growth")
pruning: Registry[protocols.PruneRule] = _builtins("pruning")
redistribution: Registry[protocols.RedistributionRule] = _builtins("redistribution")
allocation: Registry[protocols.LayerShare | protocols.LayerCounts | protocols.MaskDraw] = _builtins("allocation")
density: Registry[protocols.DensitySchedule] = _builtins("density")
rate: Registry[protocols.RateDecay] = _builtins("rate")
activation: Registry[protocols.ActivationFactory] = _builtins("activation")
transform: Registry[protocols.Transform] = _builtins("transform")
structure: Registry[protocols.Structure] = _builtins("structure")
companion: Registry[protocols.Companion] = _builtins("companion")

ALL: tuple[Registry[Any], ...] = (
    growth, pruning, redistribution, structure, allocation, density, rate, activation, transform, companion,
)  # fmt: skip
BY_KIND = {registry.kind: registry for registry in ALL}
