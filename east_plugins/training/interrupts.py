"""Ctrl-C, SIGTERM and SIGHUP, taken up between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interrupt:
    """Whether Ctrl-C was pressed, or the process was told to end."""

    pressed = False


@contextlib.contextmanager
def caught() -> Iterator[Interrupt]:
    """The first Ctrl-C, SIGTERM or SIGHUP only sets a mark, so that a step is never cut in two; the second one stops at
    once."""
    interrupt = Interrupt()

    def mark(signum: int, frame: Any) -> None:
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True

    before: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if number := getattr(signal, name, None):  # not every platform has all
                before[number] = signal.signal(number, mark)
        yield interrupt
    except ValueError:
        if before:
            raise
        yield interrupt  # not in the main thread: somebody else's business
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
