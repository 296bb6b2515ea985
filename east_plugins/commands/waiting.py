"""A command that is silent for long says that it is at work, and at what."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

from ..ops import doing

FIRST, SILENCE = 1.0, 18.0  #: seconds until the first line of a command, and between two


class Waiting(threading.Thread):
    """Says what is being done, on standard error, where nothing was printed in the first second, or for 18 since."""

    def __init__(self, command: str):
        super().__init__(daemon=True)
        self.command = command
        self.what, self.began = "loading PyTorch", time.monotonic()
        self.spoke: float | None = None  # when something was printed last
        self.over = threading.Event()
        self.error = sys.stderr

    def run(self) -> None:
        started = self.began
        while not self.over.wait(max(0.05, self._due(started) - time.monotonic())):
            if time.monotonic() >= self._due(started):
                self._say()

    def _due(self, started: float) -> float:
        return started + FIRST if self.spoke is None else self.spoke + SILENCE

    def _say(self) -> None:
        seconds = time.monotonic() - self.began
        since = f", for {seconds:.0f} s now" if seconds >= SILENCE else ""
        with contextlib.suppress(OSError, ValueError):  # nobody reads on, or it is closed
            clear = "\r\033[K" if self.error.isatty() else ""  # a bar may stand there, and comes again below
            print(f"{clear}east_plugins {self.command}: {self.what}{since}", file=self.error, flush=True)
        self.spoke = time.monotonic()

    def heard(self, what: str) -> None:
        self.what, self.began = what, time.monotonic()


class _Heard:
    """A stream that marks when something is written to it."""

    def __init__(self, stream: TextIO, waiting: Waiting):
        self._stream, self._waiting = stream, waiting

    def write(self, text: str) -> int:
        self._waiting.spoke = time.monotonic()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Handler(logging.Handler):
    def __init__(self, waiting: Waiting):
        super().__init__()
        self.waiting = waiting

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.heard(record.getMessage())


@contextlib.contextmanager
def told(command: str) -> Iterator[None]:
    """While the block runs, its silence is broken; see `Waiting`."""
    if sys.stdout is None or sys.stderr is None:  # closed, as with 2>&-
        yield
        return
    waiting = Waiting(command)
    handler, streams = _Handler(waiting), (sys.stdout, sys.stderr)
    level = doing.logger.level
    doing.logger.addHandler(handler)
    doing.logger.setLevel(logging.INFO)
    doing.logger.propagate = False
    sys.stdout, sys.stderr = (cast(TextIO, _Heard(stream, waiting)) for stream in streams)
    waiting.start()
    try:
        yield
    finally:
        waiting.over.set()
        sys.stdout, sys.stderr = streams
        doing.logger.removeHandler(handler)
        doing.logger.setLevel(level)
        doing.logger.propagate = True
