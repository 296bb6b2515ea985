"""Where the settings of a run come from: flags, a `--config` file, and what the file's own method brought with it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from . import east, flags, methods, plugged
from .config import Config
from .east import EastOptions

_FIELDS = {field.name for field in dataclasses.fields(Config)} - {"east", "plugin_options"}
_EAST = {f"east_{field.name}" for field in dataclasses.fields(EastOptions)}
#: Parameters of `train`, `compare`, what is exported and what is measured that are flags as well.
_OTHERS = {
    "out",
    "multiplier",
    "resume",
    "download",
    "methods",
    "sparsities",
    "seeds",
    "name",
    "classes",
    "channels",
    "latency",
}
_OTHERS |= {"densities", "itop", "sparseprop", "plot"}
_SPOKEN = _FIELDS | _EAST | _OTHERS
_SWITCHES = tuple(f"east_{name}" for name in east.SWITCHES)


def spoken(message: str) -> str:
    """A message of the library as the command line says it: `death_rate` is `--death-rate`."""
    return flags.spoken(message, lambda name: name in _SPOKEN or plugged.slot_of(name) is not None)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of a run, `--config` and the `--east-*` flags among them."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys; flags given here go before it")
    run = parser.add_argument_group("run")
    flags.add_flags(run, Config)
    run.add_argument(
        "--initial-density", dest="density_schedule_initial", type=float, default=argparse.SUPPRESS, metavar="X",
        help="density that gradual and one-shot begin at, the same as --density-schedule-initial",
    )  # fmt: skip
    itop = parser.add_argument_group("ITOP's own, for what they mean there")
    itop.add_argument("--sparse", action="store_true", default=argparse.SUPPRESS, help="train sparse, as always here")
    itop.add_argument(
        "--multiplier", type=int, default=argparse.SUPPRESS, metavar="N", help="so many times the epochs (default: 1)"
    )
    east.add_flags(parser)


def late(parser: argparse.ArgumentParser, known: argparse.Namespace, unknown: Sequence[str]) -> None:
    """Flags of plugins, where one may be meant: looking plugins up takes PyTorch, no other wrong flag waits for it."""
    settings = vars(known)
    if any(plugged.slot_of(_dest(flag)) for flag in unknown) or any(name in settings for name in plugged.BY_SETTING):
        add_plugin_flags(parser, settings)


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def add_plugin_flags(parser: argparse.ArgumentParser, known: Mapping[str, Any]) -> None:
    """Add the options of the plugins that are named, by flags, the `--config` file or the method, as flags."""
    given = {name: value for name, value in known.items() if value is not None}
    if (path := given.get("config")) is not None:
        given = {**_names(flags.read_yaml(path, "--config")), **given}
    if options := dict(plugged.fields(_chosen(given))):
        group = parser.add_argument_group("options of the plugins named")
        for name, field in options.items():
            if name not in _FIELDS | _EAST:
                flags.add_flag(group, name, field)


def from_flags(given: Mapping[str, Any], method: str = Config.method, data: str = Config.data) -> Config:
    """The run that parsed flags describe: the flags themselves, then `--config`.

    `method` and `data` are those of a run for which neither file nor flags name one. Where the flags name another
    method or plugin than the file, what the file says of its own is left out. Raises `UsageError` for whatever cannot
    be: an unreadable file, a misspelt key, a value out of range.
    """
    given = dict(given)
    if (path := given.pop("config", None)) is not None:
        file = _for_plugins(_for_method(_read(path), given), given)
        if given.get("east"):  # by hand: all three tricks
            file = {name: value for name, value in file.items() if value is not False or name not in _SWITCHES}
        given = {**file, **given}
    given = {"method": method, "data": data, **given}
    given.pop("sparse", None)
    if (times := given.pop("multiplier", 1)) < 1:
        raise UsageError(f"`multiplier` must be at least 1, got {times}")
    if times > 1:
        given["epochs"] = times * given.get("epochs", Config.epochs)
    plain = {name: given[name] for name in _FIELDS if name in given}
    options = {name: v for name, v in given.items() if name not in _FIELDS | _EAST and plugged.slot_of(name)}
    told = east.told(given)
    config = Config(**plain, east=EastOptions(**told), plugin_options=options)
    preset = {name: config.preset.settings.get(f"east_{name}") for name in east.SWITCHES}
    switches = {**preset, **{name: value for name, value in told.items() if name in east.SWITCHES}}
    dataclasses.replace(config.east, **switches).check_used(told)
    return config


def _chosen(given: Mapping[str, Any]) -> dict[str, str | None]:
    """Setting to name of the plugins that flags, or a file's keys, name themselves or by their method."""
    preset = methods.preset(str(given.get("method", Config.method)), given.get("dctps"))
    named = {name: given[name] for name in plugged.BY_SETTING if name in given}
    return {"decay_schedule": Config.decay_schedule, **preset.settings, **named}


def _for_method(file: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values, where `given` names another method less those in which the two methods differ: `config.yaml`
    holds all that its method stands for. Numbers of a trick that is on no longer go with it."""
    if "method" not in file or given.get("method", file["method"]) == file["method"]:
        return file
    old, new = (_all_of(name) for name in (file["method"], given["method"]))
    differ = {name for name in (*old, *new) if old.get(name) != new.get(name)}
    if "density_schedule" in differ:
        differ.add("density_schedule_initial")
    off = tuple(f"{name}_" for name in old.keys() - new.keys() - given.keys() if name.startswith("east_"))
    return {name: value for name, value in file.items() if name not in differ and not name.startswith(off)}


def _for_plugins(file: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values less the options of plugins that are not the run's: flags, or another method, name others."""
    chosen = _chosen({**file, **given})
    known = {name for name, _ in plugged.fields(chosen)}
    mine = _FIELDS | _EAST
    return {name: v for name, v in file.items() if name in mine | known or plugged.slot_of(name) is None}


def _all_of(method: str) -> dict[str, Any]:
    """All that a method stands for, its update frequency in Table B.1's run included."""
    preset = methods.preset(method)
    return {**preset.settings, "update_frequency": preset.update}


def _names(content: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}


def _read(path: str) -> dict[str, Any]:
    """What a `--config` file says, as parsed flags."""
    reader = flags.Parser(add_help=False)
    add_flags(reader)
    content = flags.read_yaml(path, "--config")
    content.pop("versions", None)
    if "config" in content:
        raise UsageError(f"--config {path}: config cannot be a key of the file; allowed are the other flags")
    try:
        add_plugin_flags(reader, _names(content))
        arguments = flags.as_arguments(content, reader, f"--config {path}")
    except UsageError as error:
        if str(error).startswith(f"--config {path}"):
            raise
        raise UsageError(f"--config {path}: {error}") from error
    try:
        values = vars(reader.parse_args(arguments))
        values |= {str(key).replace("-", "_"): False for key, value in content.items() if value is False}
        values.pop("config")
        return values
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
