"""Where the settings of a run come from: flags, a `--config` file, and what the file's own method brought with it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import east, flags, grid, inherit, methods, plugged
from .config import Config
from .east import EastOptions
from .inherit import Origins
from .programs import Program

_FIELDS = {field.name for field in dataclasses.fields(Config)} - {"east", "plugin_options", "origins"}
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
_OTHERS |= {"backend", "config", "densities", "itop", "sparseprop", "plot"}
#: Settings counted in epochs or steps, apart from those of plugins.
_COUNTED = {field.name for field in dataclasses.fields(Config) if field.metadata.get("counted")}
_COUNTED |= {f"east_{field.name}" for field in dataclasses.fields(EastOptions) if field.metadata.get("counted")}
_SPOKEN = _FIELDS | _EAST | _OTHERS | {field.name for field in dataclasses.fields(Program)}
_SWITCHES = tuple(f"east_{name}" for name in east.SWITCHES)


def spoken(message: str) -> str:
    """A message of the library as the command line says it: `death_rate` is `--death-rate`."""
    return flags.spoken(message, lambda name: name in _SPOKEN or plugged.slot_of(name) is not None)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of a run, `--config` and the `--east-*` flags among them."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys, and base: a file to "
                        "inherit from; flags given here go before it; with other --epochs what it counts in epochs and "
                        "steps is scaled")  # fmt: skip
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
        file = path.values if isinstance(path, File) else _names(inherit.chain(path))
        given = {**file, **given}
    if options := dict(plugged.fields(_chosen(given))):
        group = parser.add_argument_group("options of the plugins named")
        for name, field in options.items():
            if name not in _FIELDS | _EAST:
                flags.add_flag(group, name, field)


@dataclass(frozen=True)
class File:
    """What a `--config` file and those that it inherits from say, as parsed flags; `origins` maps each setting to its
    key and file, for messages. `blocks` are those of its `grid`."""

    path: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    blocks: Sequence[grid.Block] = ()

    def at(self, settings: Mapping[str, Any]) -> File:
        """The file of one run of its grid: values of settings, as YAML has them, added to what it says."""
        if not settings:
            return self
        source = f"the grid of {self.path}"
        said = _parsed(source, settings, _raw({**self.values, **settings}))
        values = {**over(self.values, said), **said}
        origins = {**self.origins, **{name: f"{name.replace('_', '-')} of {source}" for name in said}}
        return File(self.path, values, {name: origins[name] for name in values})


def from_flags(given: Mapping[str, Any], method: str = Config.method, data: str = Config.data) -> Config:
    """The run that parsed flags describe: the flags themselves, then `config`, the path of a file, or a `File`.

    `method` and `data` are those of a run for which neither file nor flags name one. Where the flags name another
    method or plugin than the file, what the file says of its own is left out; where they name other `epochs`, what the
    file counts in epochs and steps is scaled. Raises `UsageError` for whatever cannot be: an unreadable file, a
    misspelt key, a value out of range.
    """
    given, origins = dict(given), Origins()
    if (config := given.pop("config", None)) is not None:
        file = config if isinstance(config, File) else read(config)
        if file.blocks:
            file = dataclasses.replace(file, blocks=()).at(grid.single(file.blocks, given, f"`config` {file.path}"))
        values = over(file.values, given)
        epochs, asked = file.values.get("epochs") or 0, given.get("epochs") or 0
        if differ := epochs > 0 and asked > 0 and epochs != asked:
            values = inherit.scaled(values, _COUNTED | _counted({**values, **given}), asked / epochs)
        keys = {name: words for name, words in file.origins.items() if name not in given}
        origins = Origins(keys, epochs if differ else None)
        given = {**values, **given}
    with origins.told():
        return _config({"method": method, "data": data, **given}, origins)


def _config(given: dict[str, Any], origins: Origins) -> Config:
    given.pop("sparse", None)
    if (times := given.pop("multiplier", 1)) < 1:
        raise UsageError(f"`multiplier` must be at least 1, got {times}")
    if times > 1:
        given["epochs"] = times * given.get("epochs", Config.epochs)
    plain = {name: given[name] for name in _FIELDS if name in given}
    options = {name: v for name, v in given.items() if name not in _FIELDS | _EAST and plugged.slot_of(name)}
    told = east.told(given)
    config = Config(**plain, east=EastOptions(**told), plugin_options=options, origins=origins)
    preset = {name: config.preset.settings.get(f"east_{name}") for name in east.SWITCHES}
    switches = {**preset, **{name: value for name, value in told.items() if name in east.SWITCHES}}
    dataclasses.replace(config.east, **switches).check_used(told)
    return config


def over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a file's values where `given`, flags or a file that inherits from it, says more: neither what it
    says itself, nor what belongs to another method, or to another plugin, than it names."""
    values = _for_plugins(_for_method(dict(file), given), given)
    if given.get("east"):  # by hand: all three tricks
        values = {name: value for name, value in values.items() if value is not False or name not in _SWITCHES}
    return {name: value for name, value in values.items() if name not in given}


def _chosen(given: Mapping[str, Any]) -> dict[str, str | None]:
    """Setting to name of the plugins that flags, or a file's keys, name themselves or by their method."""
    preset = methods.preset(str(given.get("method", Config.method)), given.get("dctps"))
    named = {name: given[name] for name in plugged.BY_SETTING if name in given}
    return {"decay_schedule": "cosine", **preset.settings, **named}


def _for_method(file: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values, where `given` names another method less those in which the two methods differ: `config.yaml`
    holds all that its method stands for. Numbers of a trick that is on no longer go with it."""
    if "method" not in file or given.get("method", file["method"]) == file["method"]:
        return file
    old, new = (_all_of(name) for name in (file["method"], given["method"]))
    differ = {name for name in (*old, *new) if old.get(name) != new.get(name)}
    off = tuple(f"{name}_" for name in old.keys() - new.keys() - given.keys() if name.startswith("east_"))
    plugins = tuple(slot.prefix for slot in plugged.SLOTS if slot.setting in differ)
    others = {name for name in file if name.startswith(plugins) and name not in _FIELDS | _EAST}
    return {name: v for name, v in file.items() if name not in differ | others and not name.startswith(off)}


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


def _counted(given: Mapping[str, Any]) -> set[str]:
    """The options of the plugins named that are counted in epochs or steps."""
    return {name for name, field in plugged.fields(_chosen(given)) if field.metadata.get("counted")}


def _names(files: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The keys of files as the names of settings; a key without a value takes back what a file before says."""
    return _raw({key: value for _, content in files for key, value in content.items() if key != "grid"})


def _raw(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(key).replace("-", "_"): value for key, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def read(path: str | Path) -> File:
    """What a `--config` file says, those that it inherits from included: what a file says goes before its base, as
    flags go before a file. Raises `UsageError` naming the file and the key."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    blocks: list[grid.Block] = []
    files = inherit.chain(path)
    for i, (name, content) in enumerate(files):
        if own := "grid" in content:
            inner = content.pop("grid")
            blocks = [] if inner is None else grid.blocks(inner, f"--config {name}")
        said = _parsed(name, content, _names(files[: i + 1]))
        if not own:
            blocks = grid.without(blocks, said)
        empty = {str(key).replace("-", "_") for key, value in content.items() if value is None}
        values = {**over({k: v for k, v in values.items() if k not in empty}, said), **said}
        keys = {str(key).replace("-", "_"): str(key) for key in content}
        origins |= {setting: f"{keys.get(setting, setting)} of {name}" for setting in said}
    return File(str(path), values, {name: origins[name] for name in values}, blocks)


def _parsed(name: str, content: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """One file's keys and values, as parsed flags; `known` names the plugins whose options may be there."""
    if "versions" in content:  # a run's record; until recipes had a default per method, this was it
        content = {"recipe": "paper", **{key: value for key, value in content.items() if key != "versions"}}
    reader, source = flags.Parser(add_help=False), f"--config {name}"
    add_flags(reader)
    try:
        add_plugin_flags(reader, known)
        values = vars(reader.parse_args(flags.as_arguments(content, reader, source)))
    except UsageError as error:
        if str(error).startswith(source):
            raise
        raise UsageError(f"{source}: {error}") from error
    values |= {str(key).replace("-", "_"): False for key, value in content.items() if value is False}
    values.pop("config")
    return values
