"""The hosts of masks that are known, one file each.

To add a host: one file in this folder with a subclass of `Adapter` that has a `title`, the constructor `parameters`
that tell it from the others (or `recognises`), and `driven`, what goes around its methods (`family.DrivenMasking`
where it updates its masks in `truncate_weights`, called from `step`). It is found by lying here. Its test: a script or
host in its manner under tests/upstream/.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ...errors import UsageError
from ..adapter import Adapter, constructor_parameters


@functools.cache
def adapters() -> tuple[type[Adapter], ...]:
    """The adapters of all hosts in this folder."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [thing for module in modules for thing in vars(module).values() if isinstance(thing, type)]
    return tuple(dict.fromkeys(cls for cls in classes if issubclass(cls, Adapter) and cls.title))


def known() -> str:
    """The titles of all hosts, for messages."""
    return ", ".join(adapter.title for adapter in adapters())


def adapter_for(host_class: type) -> type[Adapter]:
    """The adapter for a class of hosts, told by its constructor; raises `UsageError` for an unknown one."""
    fitting = [adapter for adapter in adapters() if adapter.recognises(host_class)]
    if fitting:
        return max(fitting, key=lambda adapter: (len(adapter.parameters), len(adapter.__mro__)))
    parameters = ", ".join(constructor_parameters(host_class))
    raise UsageError(
        f"{host_class.__module__}.{host_class.__qualname__}({parameters}) is a host of an unknown version; known are "
        f"{known()}"
    )
