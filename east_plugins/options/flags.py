"""Dataclasses as command-line flags and YAML keys, and one-line usage errors."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import numbers
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError
from ..plugins.protocols import option

__all__ = [
    "SIZES", "Parser", "add_flag", "add_flags", "as_arguments", "check_choices", "check_size", "folder", "option",
    "read_yaml", "spoken",
]  # fmt: skip


#: Smallest and largest of what takes memory or processes: a slip of the finger must not take the machine down.
SIZES = dict(
    batch_size=(1, 2**20), threads=(1, 1024), jobs=(1, 256), width=(1, 512), image_size=(4, 4096), classes=(1, 2**20),
    channels=(1, 4096), repeats=(1, 2**20),
)  # fmt: skip

MANY_FLAGS = 25  #: a usage that names them all would fill the screen before it is said what the command does
#: What flags are called in other programs; `--density` is 1 - sparsity.
ELSEWHERE = {
    "--sparsity": ("--sparsities", "--density"),
    "--learning-rate": ("--lr",),
    "--arch": ("--model",),
    "--output": ("--out",),
}
LARGEST_YAML, DEEPEST_YAML = 2**20, 20  #: bytes and levels of a configuration file

#: Called with a parser, what is known of its arguments, and the flags among them that it does not know.
Late = Callable[[argparse.ArgumentParser, argparse.Namespace, list[str]], None]


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError` in place of printing usage, and takes no abbreviations.

    `late(parser, namespace, unknown)` adds flags that depend on others: it is called with what is known of the
    arguments, and the flags among them that are not, where there are such or help is asked for.
    """

    def __init__(
        self,
        *args: Any,
        late: Late | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.late = late

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if self.late is not None:
            plain = [arg for arg in args if arg not in ("-h", "--help")]
            helping, known = len(plain) < len(args), option_strings(self)
            unknown = [arg.split("=")[0] for arg in plain if arg.startswith("--") and arg.split("=")[0] not in known]
            if helping or unknown:
                with contextlib.suppress(*[UsageError] * helping), _nothing_required(self, helping):
                    self.late(self, self.parse_known_args(plain)[0], unknown)
        return super().parse_args(args, namespace)

    def format_help(self) -> str:
        if self.usage is None and len(actions := set(option_strings(self).values())) > MANY_FLAGS:
            required = sorted(f"{action.option_strings[0]} {action.metavar}" for action in actions if action.required)
            self.usage = " ".join(["%(prog)s", *required, "[flags]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            shown = {action.option_strings[-1] for action in option_strings(self).values()}
            near = difflib.get_close_matches(match[1].replace("_", "-"), shown, n=3)
            near = [name for name in ELSEWHERE.get(match[1], ()) if name in shown][:1] or near
            message += f"; did you mean {' or '.join(near)}?" if near else "; see --help"
        raise UsageError(message.removeprefix("argument "))


@contextlib.contextmanager
def _nothing_required(parser: argparse.ArgumentParser, so: bool) -> Iterator[None]:
    """Help is given whatever is missing."""
    required = [action for action in option_strings(parser).values() if so and action.required]
    try:
        for action in required:
            action.required = False
        yield
    finally:
        for action in required:
            action.required = True


def option_strings(parser: argparse._ActionsContainer) -> dict[str, argparse.Action]:
    """Every spelling of every flag, and what it does: argparse has no public way to ask."""
    return parser._option_string_actions


def add_flags(parser: argparse._ActionsContainer, options: type, prefix: str = "") -> None:
    """Add a flag for every field that `option` made; see `add_flag`."""
    for field in dataclasses.fields(options):
        if "help" in field.metadata:
            add_flag(parser, prefix + field.name, field)


def add_flag(parser: argparse._ActionsContainer, dest: str, field: dataclasses.Field[Any]) -> None:
    """Add the flag of one field; `--like-this` and `--like_this` both work. A flag that is not given leaves no trace in
    the namespace. Raises `UsageError` where another flag has the name."""
    settings = dict(field.metadata)
    settings.pop("counted", None)
    aliases, switch = settings.pop("aliases", ()), settings.pop("switch", isinstance(field.default, bool))
    if switch:
        settings["action"] = "store_true"
    elif field.default is not None:
        shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
        settings["help"] += f" (default: {shown})"
    if isinstance(settings.get("type"), type):
        settings.setdefault("metavar", {int: "N", float: "X"}.get(settings["type"]))
    elif "choices" not in settings and not switch:
        settings.setdefault("metavar", "NAME")
    settings["help"] = settings["help"].replace("%", "%%")
    names = dict.fromkeys([f"--{dest.replace('_', '-')}", *aliases])
    try:
        action = parser.add_argument(*names, dest=dest, default=argparse.SUPPRESS, **settings)
    except argparse.ArgumentError as error:
        raise UsageError(
            f"the plugin's option {field.name!r} would be {min(names)}, which is a flag already"
        ) from error
    for name in list(action.option_strings):  # ITOP's spelling, not shown in --help
        option_strings(parser).setdefault("--" + name.removeprefix("--").replace("-", "_"), action)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@functools.cache
def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that a dataclass declares for its fields, where they are all plain ones."""
    unions = typing.Union, types.UnionType
    hints = {
        name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {name: kinds for name, kinds in hints.items() if {*kinds} <= {*_KINDS, type(None)}}


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind) or (kind is str and (callable(value) or isinstance(value, os.PathLike)))


def check_choices(options: Any, prefix: str = "") -> None:
    """Raises `UsageError` for a field of a dataclass that is of another type than declared, or none of the choices
    which `option` gave it; `prefix` goes before the field's name in the message."""
    kinds = _kinds(type(options))  # type: ignore[arg-type]
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), field.metadata.get("choices")
        allowed = kinds.get(field.name, ())
        if allowed and not any(_is(value, kind) for kind in allowed):
            wanted = " or ".join(_KINDS[kind] for kind in allowed if kind in _KINDS)
            raise UsageError(f"`{prefix}{field.name}` must be {wanted}, got {value!r}")
        if choices is not None and value is not None and value not in choices:
            raise UsageError(f"`{prefix}{field.name}` must be one of {', '.join(map(str, choices))}, got {value!r}")


def spoken(message: str, is_setting: Callable[[str], bool]) -> str:
    """A message of the library as the command line says it: settings in backticks become flags."""

    def flag(match: re.Match[str]) -> str:
        return "--" + match[1].replace("_", "-") if is_setting(match[1]) else match[0]

    return re.sub(r"`([a-z][a-z0-9_]*)`", flag, message)


def folder(text: str) -> Path:
    """The path of a folder, as argparse's `type`; the empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def check_size(name: str, value: int | None, spoken_name: str | None = None) -> None:
    """Refuse a number of `SIZES` that is out of its bounds by `UsageError`; None, nothing said, is allowed."""
    low, high = SIZES[name]
    if value is not None and not low <= value <= high:
        bound = f"at least {low}" if value < low else f"at most {high}"
        raise UsageError(f"{spoken_name or f'`{name}`'} must be {bound}, got {value}")


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UsageError` naming `flag` where there is none."""
    import yaml

    if not str(path):
        raise UsageError(f"{flag} is empty: it must name a YAML file")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_YAML + 1).decode()
        if len(text) > LARGEST_YAML:
            raise UsageError(f"{flag} {path} is larger than {LARGEST_YAML:,} bytes, the most that is read")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # few bytes can stand for gigabytes, or for minutes
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{flag} {path} repeats parts of itself by * and &: write them out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise UsageError(f"{flag} {path} is nested deeper than {DEEPEST_YAML} levels, the most that is read")
        if key := _twice(yaml.compose(text, yaml.SafeLoader)):
            raise UsageError(f"{flag} {path} says {key} twice; allowed is once")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"{flag} {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{flag} {path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{flag} {path} must hold keys and values such as 'density: 0.001'")
    return content


def _twice(node: Any) -> str | None:
    """A key that a mapping in a YAML document has twice, of which the loader would take the last."""
    if not isinstance(getattr(node, "value", None), list):
        return None
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [str(key.value).replace("_", "-") for key, _ in pairs]
    inside = (value for pair in node.value for value in (pair if isinstance(pair, tuple) else [pair]))
    again = next((key for key in keys if keys.count(key) > 1), None)
    return again or next(filter(None, map(_twice, inside)), None)


def as_arguments(values: Mapping[str, Any], parser: argparse.ArgumentParser, source: str) -> list[str]:
    """The arguments that say what a mapping of flag names (without dashes) to values says.

    True gives a bare flag, False and None nothing, a list its items joined by commas. Raises `UsageError` naming
    `source` for a key that is no flag, or where one but not both of flag and value are of the kind true or false.
    """
    arguments = []
    for key, value in values.items():
        name = "--" + str(key).replace("_", "-")
        action = option_strings(parser).get(name)
        if action is None:
            near = difflib.get_close_matches(name, option_strings(parser), n=1)
            hint = f"did you mean {near[0].removeprefix('--')}? " if near else ""
            raise UsageError(f"{source}: unknown key {str(key)!r}; {hint}see --help")
        switch = action.nargs == 0
        if value is None or (switch and value is False):
            continue
        if switch and value is not True:
            raise UsageError(f"{source}: {key} must be true or false, got {value!r}")
        if not switch and isinstance(value, bool):
            kind = {int: "a whole number", float: "a number"}.get(action.type, "a text")  # type: ignore[call-overload]
            raise UsageError(f"{source}: {key} must be {kind}, got {str(value).lower()}")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        arguments.append(name if switch else f"{name}={text}")
    return arguments
