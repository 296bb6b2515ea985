"""Parsers of commands: usage that names the command as it was called, and two examples behind the flags."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import flags, sources


def program() -> str:
    """What was typed: `east` where that is installed and was called, else `python -m east_plugins`."""
    name = Path(sys.argv[0]).name
    return name if name == "east" else "python -m east_plugins"


def add_trust(parse: argparse.ArgumentParser) -> None:
    """Add `--trust`: by itself nothing is imported that a run's files name as module:name."""
    parse.add_argument(
        "--trust", type=_trusted, action="append", metavar="MODULE:NAME", help="a plugin of your own that the runs name"
    )


def _trusted(name: str) -> str:
    from ..plugins import registry

    registry.trust([name])
    return name


def parser(command: str, description: str, *examples: str, late: flags.Late | None = None) -> flags.Parser:
    """The parser of `command`; `examples` are what may follow the program's name, `late` is as in `flags.Parser`."""
    lines = "\n".join(f"  {program()} {example}" for example in examples)
    return flags.Parser(
        prog=f"{program()} {command}",
        description=textwrap.fill(description, 100),
        epilog=f"examples:\n{lines}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        late=late,
    )


def add_backend(group: argparse._ArgumentGroup) -> None:
    """Add `--jobs` and `--backend`: where many runs are trained."""
    group.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: 1; with Ray as many as it has room for)"
    )
    group.add_argument(
        "--backend",
        choices=["local", "ray"],
        default="local",
        help="processes of this machine, spread over its GPUs, or tasks of a Ray cluster (default: local)",
    )


def check_config(given: Mapping[str, Any]) -> None:
    """Read the `--config` file that is named, if any, so that an error in it is said before PyTorch is loaded."""
    if given.get("config") is not None:
        sources.read(given["config"])


def numbers(flag: str, text: str | None, kind: type) -> list[Any] | None:
    """`0.9,0.99` as numbers of a kind, None as it is; raises `UsageError` naming the flag."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} must be numbers joined by commas, got {text!r}") from None
