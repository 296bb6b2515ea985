"""Tables of text: for terminals, and for Markdown files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Columns as wide as their widest cell, two spaces apart; `align` has "<" or ">" for each of them."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    spaced = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in spaced)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same as a table of Markdown, which aligns for itself."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"
