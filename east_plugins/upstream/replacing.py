"""Replacing a function of somebody else's for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Callable, old: Callable | None = None) -> Iterator[None]:
    """`owner.name` is `new` for a while, and its old self (or `old`) again afterwards."""
    old = old or getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)
