"""Extending a module in place by swapping its class.

A `forward` replaced on the instance is a closure over that instance: a deepcopy of it keeps computing with the
original's weights. A swapped class travels with every copy and pickle (torch.nn.utils.parametrize's technique).
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any


class Swapped:
    """Base of what is mixed in: objects of the generated class are copied and pickled as (mixins, base, state)."""

    east_mixin: type[Swapped]
    east_base: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(2, protocol))
        assert isinstance(reduced, tuple)
        return _new, _parts(type(self)), *reduced[2:]

    @classmethod
    def east_members(cls, base: type) -> dict[str, Any]:
        """What a class that mixes this into `base` has besides."""
        return {}


def swap(module: Any, mixin: type[Swapped]) -> None:
    """Make `module` an instance of `mixin` as well; its class keeps its name, so that its repr does not change."""
    module.__class__ = _subclass(mixin, type(module))


def restore(module: Any, mixin: type[Swapped] | None = None) -> None:
    """Undo the `swap` of a mixin, or the last one; what else was mixed in stays."""
    mixins, base = _parts(type(module))
    kept = list(mixins)
    kept.remove(mixins[0] if mixin is None else mixin)
    module.__class__ = _class(kept, base)


def _parts(cls: type) -> tuple[tuple[type[Swapped], ...], type]:
    """What is mixed into a class, the last one first, and the class itself."""
    mixins = []
    while "east_mixin" in vars(cls):
        mixins.append(vars(cls)["east_mixin"])
        cls = vars(cls)["east_base"]
    return tuple(mixins), cls


def _class(mixins: Sequence[type[Swapped]], base: type) -> type:
    for mixin in reversed(mixins):
        base = _subclass(mixin, base)
    return base


_made: dict[tuple[type[Swapped], type], type] = {}


def _subclass(mixin: type[Swapped], base: type) -> type:
    if (mixin, base) not in _made:
        _made[mixin, base] = _make(mixin, base)
    return _made[mixin, base]


def _make(mixin: type[Swapped], base: type) -> type:
    namespace = dict(
        east_mixin=mixin,
        east_base=base,
        __module__=base.__module__,
        __qualname__=base.__qualname__,
        __doc__=base.__doc__,
        **mixin.east_members(base),
    )
    return types.new_class(base.__name__, (mixin, base), exec_body=lambda ns: ns.update(namespace))


def _new(mixins: type[Swapped] | Sequence[type[Swapped]], base: type) -> Any:
    cls = _class((mixins,) if isinstance(mixins, type) else mixins, base)  # one mixin: a pickle of version 0.1
    return cls.__new__(cls)  # type: ignore[call-overload]  # not a metaclass
