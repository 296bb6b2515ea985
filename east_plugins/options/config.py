"""What one training run is: options as flags and YAML, method presets, and defaults resolved to numbers."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnknownNameError, UsageError
from ..plugins import registry
from ..plugins.density import check_density
from . import east, flags
from .east import EastOptions, scaled_steps
from .flags import option

#: What a method name stands for; `update` is the update frequency in steps of Table B.1's run.
METHODS: dict[str, dict[str, Any]] = {
    "dense": dict(density=1.0, static=True),
    "static": dict(static=True),
    "synflow": dict(static=True, sparse_init="synflow"),
    "set": dict(growth="random", death="magnitude", update=1500),
    "rigl": dict(growth="gradient", death="magnitude", update=4000),
    "snfs": dict(growth="momentum", death="magnitude", redistribution="momentum", update=352),
    "gmp": dict(
        growth="gradient",
        death="magnitude",
        death_rate=0.0,
        density_schedule="gradual",
        initial_density=1.0,
        update=1000,
    ),
    "granet": dict(growth="gradient", death="magnitude", prune_scope="global", density_schedule="gradual", update=1000),
    "east": dict(growth="gradient", death="magnitude", update=4000, tricks=("cyclic", "dyrelu", "share")),
}
#: What `+NAME` behind a method adds, as in `rigl+dyrelu`.
TRICKS: dict[str, dict[str, Any]] = {
    "cyclic": dict(east_cyclic=True),
    "dyrelu": dict(east_dyrelu=True),
    "share": dict(east_share=True),
    "connected": dict(sparse_init="connected", weight_init="sparse-fan-in"),
    "dctps": dict(dctps=True),
}
DENSITY_SCHEDULES = ("constant", "gradual", "one-shot")


def _epochs(text: str) -> list[float]:
    """`75,150` as numbers; `none` as no epoch at all."""
    try:
        return [] if text in ("", "none") else [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs joined by commas, or none, got {text!r}") from None


@dataclass(frozen=True)
class Config:
    """Options of `train`, with ITOP's names where it has them. None: depends on the method or the run's length."""

    method: str = option(
        "east", "method, with +trick for each addition: " + ", ".join(METHODS) + "; tricks: " + ", ".join(TRICKS)
    )
    model: str = option("resnet34", "network, see `info --model help`")
    width: int | None = option(None, "channels of the network's stem (default: its own, 64 in resnet34)", type=int)
    data: str = option("digits", "digits, mnist, fashionmnist, cifar10, cifar100, tinyimagenet, imagenet or folder")
    data_dir: str | None = option(None, "folder that the data lies in", metavar="DIR")
    image_size: int | None = option(None, "pixels of an image's side (default: the data's own)", type=int)
    limit: int | None = option(None, "train on so many images only", type=int)
    validation: float = option(0.1, "share of the training images that chooses the checkpoint", type=float)

    density: float | None = option(None, "active share of the maskable weights (default: 0.001)", type=float)
    growth: str | None = option(None, "growth rule")
    death: str | None = option(None, "prune rule")
    redistribution: str | None = option(None, "redistribution rule (default: none)")
    death_rate: float | None = option(
        None, "share of the active weights replaced in an update (default: 0.5)", type=float
    )
    decay_schedule: str = option("cosine", "decay of the death rate: cosine, linear or constant")
    update_frequency: int | None = option(
        None, "steps between topology updates (default: SET 1500, RigL and EAST 4000 of 250 epochs' steps)", type=int
    )
    sparse_init: str | None = option(
        None, "allocation: ERK, ER, uniform, EPL, EPF, first-blocks, connected, synflow (default: ERK)"
    )
    connected_budgets: str | None = option(
        None, "--sparse-init connected: allocation that gives each layer its number (default: ERK)"
    )
    connected_width: float | None = option(
        None, "--sparse-init connected: channels in use are a layer's number to this power (default: 0.5)", type=float
    )
    weight_init: str | None = option(
        None, "initial values; sparse-fan-in scales them for the active fan-in", choices=["default", "sparse-fan-in"]
    )
    quiet_branches: str | None = option(
        None, "residual branches whose last norm's scale starts at zero (default: none)", choices=["all", "loops"]
    )
    prune_scope: str | None = option(None, "prune per layer or over all (default: local)", choices=["local", "global"])
    keep_connected: bool = option(False, "updates keep weights on input-to-output paths")
    density_schedule: str | None = option(None, "density over time without cycles", choices=DENSITY_SCHEDULES)
    initial_density: float | None = option(None, "density that gradual and one-shot begin at", type=float)
    dctps: bool = option(False, "DCTpS layers: a fixed DCT matrix plus the sparse weights")
    dctps_engine: str = option(
        "dense", "how DCTpS layers are computed; auto measures, dense repeats bit for bit",
        choices=["auto", "dense", "fft", "separable"],
    )  # fmt: skip
    transform: str | None = option(None, "model transform of your own, module:function", metavar="NAME")

    epochs: int = option(250, "passes over the training images", type=int)
    batch_size: int = option(128, "images a step", type=int)
    optimizer: str = option("sgd", "optimizer", choices=["sgd", "adam", "adamw"])
    lr: float | None = option(None, "learning rate (default: 0.1 for sgd, 0.001 for adam and adamw)", type=float)
    lr_drops: list[float] | None = option(
        None, "epochs of tenfold drops of the rate (default: 75,150 of 250; adam: none)", type=_epochs, metavar="E,E"
    )
    momentum: float = option(0.9, "momentum of sgd", type=float)
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(1e-4, "L2 regularisation", type=float, aliases=["--l2"])
    seed: int = option(0, "seed of everything random", type=int)
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)", type=int)
    engine: str = option(
        "auto", "how passes are computed: densely, for active weights only, or the faster as measured; dense and "
        "sparse repeat bit for bit", choices=["auto", "dense", "sparse"],
    )  # fmt: skip
    compile: bool = option(False, "training passes by torch.compile, dense (--engine dense); needs a C compiler")
    amp: bool = option(False, "bfloat16 autocast")
    channels_last: bool = option(False, "channels-last memory format")
    east: EastOptions = EastOptions()

    def __post_init__(self):
        self._check_numbers()
        self._check_names()
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise UsageError(f"--nesterov needs --optimizer sgd and --momentum over 0, got {self.optimizer} and "
                             f"{self.momentum:g}")  # fmt: skip
        if self.compile and self.engine == "sparse":
            raise UsageError("--compile goes with --engine dense: the sparse engine has compiled kernels of its own")
        if self.east.cyclic and self.density_schedule not in (None, "constant"):
            raise UsageError(f"--method {self.method}: --east-cyclic and --density-schedule {self.density_schedule} "
                             "both set the density over time; allowed with cycles is constant")  # fmt: skip

    def _check_numbers(self) -> None:
        for name in ("density", "initial_density"):
            if getattr(self, name) is not None:
                check_density(getattr(self, name), f"--{name.replace('_', '-')}")
        positive = ("epochs", "batch_size", "update_frequency", "width", "limit", "image_size", "threads")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        ranges = dict(
            lr=(0, 1e6),
            momentum=(0, 1),
            weight_decay=(0, 1e6),
            death_rate=(0, 1),
            seed=(-(2**63), 2**64 - 1),
            connected_width=(0, 1),
        )
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be in [{low}, {high}], got {value}")
        for epoch in self.lr_drops or ():
            if not 0 <= epoch < math.inf:
                raise UsageError(f"--lr-drops must be epochs from 0 on, got {epoch}")

    def _check_names(self) -> None:
        for name, kind in (
            ("growth", "growth"),
            ("death", "pruning"),
            ("redistribution", "redistribution"),
            ("sparse_init", "allocation"),
            ("connected_budgets", "allocation"),
            ("decay_schedule", "rate"),
        ):
            value = getattr(self, name)
            if value is None or (name == "redistribution" and value == "none"):
                continue
            try:
                registry.BY_KIND[kind].entry(value)
            except UsageError as error:
                raise UsageError(f"--{name.replace('_', '-')}: {error}") from error

    @property
    def allocation_options(self) -> dict[str, Any]:
        """Options of the allocation, as `Masking.add_module` takes them."""
        given = {"budgets": self.connected_budgets, "width": self.connected_width}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def static(self) -> bool:
        return bool(METHODS[self.method.split("+")[0]].get("static"))

    def resolve(self, steps_per_epoch: int) -> Config:
        """All defaults filled in for a run of `epochs` times `steps_per_epoch` steps (Table B.1, scaled)."""
        total = self.epochs * steps_per_epoch
        preset = METHODS[self.method.split("+")[0]]
        adam = self.optimizer != "sgd"
        drops = [] if adam else [self.epochs * drop / east.REFERENCE_EPOCHS for drop in (75, 150)]
        values = dict(
            density=0.001, growth="random", death="magnitude", redistribution="none", death_rate=0.5, sparse_init="ERK",
            weight_init="default", prune_scope="local", lr=0.001 if adam else 0.1, lr_drops=drops,
        )  # fmt: skip
        if "update" in preset:
            values["update_frequency"] = scaled_steps(preset["update"], total)
        filled = {name: value for name, value in values.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **filled)
        first_drop = min(config.lr_drops, default=None)
        tricks = config.east.resolve(self.epochs, steps_per_epoch, first_drop)
        if tricks.dyrelu and self.east.dyrelu_end is None and round(tricks.dyrelu_end * steps_per_epoch) < 1:
            raise UsageError(f"--epochs {self.epochs}: a run of {total} steps is too short for the phase-out of "
                             f"--method {self.method}, which must end before the first learning-rate drop")  # fmt: skip
        return dataclasses.replace(config, east=tricks)

    def as_dict(self) -> dict[str, Any]:
        """Flag names to values: what `parse` reads back from YAML. Methods are recorded with all they stand for."""
        values = {name: value for name, value in vars(self).items() if name != "east" and value is not None}
        values |= {name: False for name in split_method(self.method, self.dctps) if name in _SWITCHES}
        values |= {
            f"east_{name}": value for name, value in vars(self.east).items() if getattr(self.east, name.split("_")[0])
        }
        return {name.replace("_", "-"): value for name, value in values.items()}


def split_method(name: str, dctps: bool | None = None) -> dict[str, Any]:
    """The options that a method name such as `rigl+connected` stands for; raises `UnknownNameError`.

    On DCTpS layers (`dctps`; None: as the name says) `east` leaves weight sharing out, as the paper does (Section 4).
    """
    base, *tricks = name.split("+")
    if base not in METHODS:
        raise UnknownNameError("--method", base, METHODS)
    values = {key: value for key, value in METHODS[base].items() if key not in ("update", "static", "tricks")}
    for trick in (*METHODS[base].get("tricks", ()), *tricks):
        if trick not in TRICKS:
            raise UsageError(f"--method {name}: {UnknownNameError('trick', trick, TRICKS)}")
        values |= TRICKS[trick]
    if ("dctps" in tricks if dctps is None else dctps) and "share" not in tricks:
        values.pop("east_share", None)
    return values


def add_flags(parser: flags.Parser) -> None:
    """Add all flags of a run, `--config` and the `--east-*` flags among them."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys; flags given here go before it")
    flags.add_flags(parser.add_argument_group("run"), Config)
    east.add_flags(parser)


def from_flags(given: Mapping[str, Any], method: str = Config.method, data: str = Config.data) -> Config:
    """The run that parsed flags describe: method preset, then `--config`, then the flags themselves.

    `method` and `data` are those of a run for which neither file nor flags name one. Where the flags name
    another method than the file, what the file says of its own method is left out. Raises `UsageError` for whatever
    cannot be: an unreadable file, a misspelt key, a value out of range.
    """
    given = dict(given)
    if path := given.pop("config", None):
        file = _for_method(_read(path), given)
        if given.get("east"):  # by hand: all three tricks
            file = {name: value for name, value in file.items() if value is not False or name not in _SWITCHES}
        given = {**file, **given}
    given = {"method": method, "data": data, **given}
    preset = split_method(given["method"], given.get("dctps"))
    values = {**preset, **given}
    names = {field.name for field in dataclasses.fields(Config)}
    options = {name: values[name] for name in names - {"east"} if name in values}
    return Config(**options, east=east.from_flags(given, preset))


_SWITCHES = ("east_cyclic", "east_dyrelu", "east_share")


def _for_method(file: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values, where `given` names another method less those in which the two methods differ: `config.yaml`
    holds all that its method stands for. Numbers of a trick that is on no longer go with it."""
    if "method" not in file or given.get("method", file["method"]) == file["method"]:
        return file
    old, new = _preset(file["method"]), _preset(given["method"])
    differ = {name for name in (*old, *new) if old.get(name) != new.get(name)}
    if "density_schedule" in differ:
        differ.add("initial_density")
    off = tuple(f"{name}_" for name in old.keys() - new.keys() - given.keys() if name.startswith("east_"))
    return {name: value for name, value in file.items() if name not in differ and not name.startswith(off)}


def _preset(method: str) -> dict[str, Any]:
    """All that a method stands for, its update frequency in Table B.1's run included."""
    return {**split_method(method), "update_frequency": METHODS[method.split("+")[0]].get("update")}


def _read(path: str) -> dict[str, Any]:
    """What a `--config` file says, as parsed flags."""
    parser = flags.Parser(add_help=False)
    add_flags(parser)
    content = flags.read_yaml(path, "--config")
    content.pop("versions", None)
    if "config" in content:
        raise UsageError(f"--config {path}: config cannot be a key of the file; allowed are the other flags")
    arguments = flags.as_arguments(content, parser, f"--config {path}")
    try:
        values = vars(parser.parse_args(arguments))
        values |= {str(key).replace("-", "_"): False for key, value in content.items() if value is False}
        values.pop("config")
        split_method(values.get("method", Config.method))
        return values
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
