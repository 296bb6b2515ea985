"""Dataclasses as command-line flags and YAML keys, and one-line usage errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError


def option(default: Any, help: str, **argparse_kwargs: Any) -> Any:
    """A dataclass field with what argparse needs to make a flag of it; a `bool` field becomes a switch."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse_kwargs})


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError` in place of printing usage, and takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            near = difflib.get_close_matches(match[1], self._option_string_actions, n=3)
            message += f"; did you mean {' or '.join(near)}?" if near else "; see --help"
        raise UsageError(message.removeprefix("argument "))


def add_flags(parser: argparse._ActionsContainer, options: type, prefix: str = "") -> None:
    """Add a flag for every field; `--like-this` and `--like_this` both work. Flags that are not given leave no
    trace in the namespace."""
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        settings = dict(field.metadata)
        aliases = settings.pop("aliases", ())
        if field.type == "bool":
            settings["action"] = "store_true"
        elif field.default is not None:
            shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
            settings["help"] += f" (default: {shown})"
        if isinstance(settings.get("type"), type):
            settings.setdefault("metavar", {int: "N", float: "X"}.get(settings["type"]))
        elif "choices" not in settings and field.type != "bool":
            settings.setdefault("metavar", "NAME")
        dest = prefix + field.name
        names = dict.fromkeys([f"--{dest.replace('_', '-')}", *aliases])
        action = parser.add_argument(*names, dest=dest, default=argparse.SUPPRESS, **settings)
        _accept_underscores(parser, action)


def _accept_underscores(parser: argparse._ActionsContainer, action: argparse.Action) -> None:
    for name in list(action.option_strings):
        spelled = "--" + name.removeprefix("--").replace("-", "_")
        parser._option_string_actions.setdefault(spelled, action)  # ITOP's spelling, not shown in --help


def folder(text: str) -> Path:
    """The path of a folder, as argparse's `type`; the empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UsageError` naming `flag` where there is none."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{flag} {path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{flag} {path} must hold keys and values such as 'density: 0.001'")
    return content


def as_arguments(values: Mapping[str, Any], parser: argparse.ArgumentParser, source: str) -> list[str]:
    """The arguments that say what a mapping of flag names (without dashes) to values says.

    True gives a bare flag, False and None nothing, a list its items joined by commas. Raises `UsageError` naming
    `source` for a key that is no flag, or where one but not both of flag and value are of the kind true or false.
    """
    arguments = []
    for key, value in values.items():
        name = "--" + str(key).replace("_", "-")
        action = parser._option_string_actions.get(name)
        if action is None:
            near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
            hint = f"did you mean {near[0].removeprefix('--')}? " if near else ""
            raise UsageError(f"{source}: unknown key {str(key)!r}; {hint}see --help")
        switch = action.nargs == 0
        if value is None or (switch and value is False):
            continue
        if switch and value is not True:
            raise UsageError(f"{source}: {key} must be true or false, got {value!r}")
        if not switch and isinstance(value, bool):
            kind = {int: "a whole number", float: "a number"}.get(action.type, "a text")
            raise UsageError(f"{source}: {key} must be {kind}, got {str(value).lower()}")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        arguments.append(name if switch else f"{name}={text}")
    return arguments
