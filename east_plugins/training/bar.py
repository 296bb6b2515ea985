"""The line on a terminal that says how far a run is: it is written over, and fits the terminal's width."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import TextIO

EVERY = 0.5  #: seconds between two lines
SMALLEST, LARGEST = 8, 40  #: characters of the bar itself, behind the words where there is room
CLEAR = "\r\033[K"


class Bar:
    """A line on `stream`, a terminal."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.shown = -math.inf

    @property
    def due(self) -> bool:
        """Whether the last line is old enough."""
        return time.monotonic() - self.shown >= EVERY

    def show(self, forms: Sequence[str], share: float) -> None:
        """The first one of the forms that fits, longest first, of which the last one is cut off; `share` is done."""
        width = self._width()
        text = next((form for form in forms if len(form) <= width), forms[-1][:width])
        room = min(LARGEST, width - len(text) - 4)
        done = round(room * share)
        bar = f"  |{'█' * done}{' ' * (room - done)}|" if room >= SMALLEST else ""
        self.stream.write(CLEAR + text + bar)
        self.stream.flush()
        self.shown = time.monotonic()

    def clear(self) -> None:
        """Make room for a line of somebody else's."""
        self.stream.write(CLEAR)
        self.shown = -math.inf

    def close(self) -> None:
        self.stream.write("\n")
        self.stream.flush()

    def _width(self) -> int:
        """Columns but the last one, in which some terminals break the line."""
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1
