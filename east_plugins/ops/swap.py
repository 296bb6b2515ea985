"""Extending a module in place by swapping its class.

A `forward` replaced on the instance is a closure over that instance: a deepcopy of it keeps computing with the
original's weights. A swapped class travels with every copy and pickle (torch.nn.utils.parametrize's technique).
"""

from __future__ import annotations

import types
from typing import Any


class Swapped:
    """Base of what is mixed in: objects of the generated class are copied and pickled as (mixin, base, state)."""

    east_mixin: type[Swapped]
    east_base: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(2, protocol))
        assert isinstance(reduced, tuple)
        return _new, (self.east_mixin, self.east_base), *reduced[2:]


def swap(module: Any, mixin: type[Swapped]) -> None:
    """Make `module` an instance of `mixin` as well; its class keeps its name, so that its repr does not change."""
    module.__class__ = _subclass(mixin, type(module))


def restore(module: Any) -> None:
    """Undo the last `swap`."""
    module.__class__ = type(module).east_base


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
    )
    return types.new_class(base.__name__, (mixin, base), exec_body=lambda ns: ns.update(namespace))


def _new(mixin: type[Swapped], base: type) -> Any:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)  # type: ignore[call-overload]  # not a metaclass
