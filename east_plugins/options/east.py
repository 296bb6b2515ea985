"""EAST's options: one dataclass that becomes the `--east-*` flags of every command, and back.

Lengths are in epochs as in the paper's Table B.1, update frequencies in optimizer steps. What is not given by hand
is Table B.1's value for 250 epochs of 352 steps, scaled to the run (`EastOptions.resolve`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..plugins.density import PATTERNS, Constant, Cyclic, OpenCyclic
from . import flags
from .flags import option, read_yaml
from .plugged import rename

if TYPE_CHECKING:
    from ..plugins.activation.phased import PhaseOut

#: Table B.1's run: 250 epochs of 45,000 images (a tenth is for validation, as in ITOP's code) in batches of 128.
REFERENCE_EPOCHS = 250
REFERENCE_STEPS_PER_EPOCH = 352
REFERENCE_STEPS = REFERENCE_EPOCHS * REFERENCE_STEPS_PER_EPOCH

SWITCHES = ("cyclic", "dyrelu", "share")

#: Activations that DyReLU can stand in for: those of `plugins.activation.probe`, which needs torch.
REPLACED = ("relu", "relu6", "gelu", "silu", "hardswish")


@dataclass(frozen=True)
class EastOptions:
    """Which of the three tricks are asked for, and their numbers; None where the method or the run's length decides."""

    cyclic: bool | None = option(
        None, "cyclic sparsity: the density swings up and back, then stays at the target", switch=True
    )
    cyclic_pattern: str = option("triangular", "shape of a cycle", choices=sorted(PATTERNS))
    cyclic_cycles: int = option(2, "number of cycles", type=int)
    cyclic_length: float | None = option(
        None, "epochs of the first cycle (default: a fifth of the run, as 50 of 250)", type=float, counted=True
    )
    cyclic_multiplier: float = option(10.0, "peak density as a multiple of the target", type=float)
    cyclic_length_mult: float = option(1.0, "length of each cycle as a multiple of the one before", type=float)
    cyclic_update_frequency: int | None = option(
        None,
        "steps between topology updates inside the cycles (default: the run's steps / 251, as 350 of 88,000, but at "
        "least 10, or a quarter of a shorter cycle)",
        type=int,
        counted=True,
    )
    cyclic_replace: bool | None = option(
        None, "updates inside the cycles replace weights as well, beside following the density", switch=True
    )
    cyclic_open: bool | None = option(
        None, "cycles as the authors' code runs them: no update closes them, and the density stays above the target",
        switch=True,
    )  # fmt: skip
    dyrelu: bool | None = option(
        None, "phased activation: DyReLU for every ReLU at first, plain ReLU at the end", switch=True
    )
    dyrelu_type: str = option(
        "b", "DyReLU-A, -B or -C, the name of any activation factory (`plugins` lists them), or module:factory"
    )
    dyrelu_reduction: int | None = option(
        None, "DyReLU's hidden layer has a channel for every N of its input (default: 4)", type=int
    )
    dyrelu_start: float | None = option(
        None, "epoch at which the phase-out starts (default: half of its end)", type=float, counted=True
    )
    dyrelu_end: float | None = option(
        None, "epoch at which plain ReLU is left (default: just before the first learning-rate drop)", type=float,
        counted=True,
    )  # fmt: skip
    dyrelu_blend: str | None = option(
        None, "blended in the phase-out: outputs, or DyReLU's coefficients with (1, 0, 0, 0) (default: outputs)",
        choices=["outputs", "coefficients"],
    )  # fmt: skip
    dyrelu_late: bool | None = option(
        None, "plain ReLU until the phase-out begins, at which DyReLU enters", switch=True
    )
    dyrelu_replaces: str = option(
        "relu", f"activations that it stands in for, with commas between: {', '.join(REPLACED)}; each ends as it was"
    )
    share: bool | None = option(None, "weight sharing between the equal blocks of every residual stage", switch=True)
    share_from: int = option(2, "block of a stage, counted from 1, that lends its weights to the later ones", type=int)

    share_scale: str | None = option(
        None, "start of the scales of borrowed weights: one, or uniform in (0, 1) (default: one)",
        choices=["one", "uniform"],
    )  # fmt: skip

    def __post_init__(self) -> None:
        flags.check_choices(self, "east_")
        for name, low in (("cyclic_length", 0), ("dyrelu_start", -1), ("dyrelu_end", -1)):
            value = getattr(self, name)
            if value is not None and not low < value < 1e9:
                raise UsageError(f"{flag(name)} must be a number of epochs, got {value}")
        if self.dyrelu_reduction is not None and self.dyrelu_reduction < 1:
            raise UsageError(f"{flag('dyrelu_reduction')} must be at least 1, got {self.dyrelu_reduction}")
        if wrong := set(self.dyrelu_replaced) - set(REPLACED):
            raise UsageError(
                f"{flag('dyrelu_replaces')} {self.dyrelu_replaces!r}: allowed are {', '.join(REPLACED)}, with commas "
                f"between, got {', '.join(sorted(wrong)) or 'none'}"
            )
        if self.share_from < 1:
            raise UsageError(f"{flag('share_from')} must be at least 1, got {self.share_from}")
        if self.dyrelu_start is not None and self.dyrelu_end is not None and self.dyrelu_end < self.dyrelu_start:
            raise UsageError(
                f"{flag('dyrelu_end')} {self.dyrelu_end:g} lies before {flag('dyrelu_start')} {self.dyrelu_start:g}; "
                "allowed is the same epoch or a later one"
            )

    @property
    def dyrelu_replaced(self) -> tuple[str, ...]:
        """Names of the activations that DyReLU stands in for."""
        return tuple(name.strip() for name in self.dyrelu_replaces.split(","))

    @property
    def has_coefficients(self) -> bool:
        """Whether the phased activation is DyReLU in place of ReLU, whose coefficients can be blended."""
        name = self.dyrelu_type.lower().removeprefix("dyrelu-")
        return name in ("a", "b", "c") and set(self.dyrelu_replaced) == {"relu"}

    @property
    def any(self) -> bool:
        return bool(self.cyclic or self.dyrelu or self.share)

    def check_used(self, given: Mapping[str, Any] | None = None) -> None:
        """Raises `UsageError` for a number (of `given`, or other than its default) whose trick is not on."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in (vars(self) if given is None else given).items():
            trick = name.split("_")[0]
            told = value is not None and (given is not None or value != defaults[name])
            if name != trick and told and not getattr(self, trick):
                raise UsageError(f"{flag(name)} needs {flag(trick)}")

    def resolve(self, epochs: float, steps_per_epoch: int, first_drop: float | None = None) -> ResolvedEast:
        """The options with every switch and number filled in for a run of this length.

        `first_drop` is the epoch of the first learning-rate drop (half of the run where None). The paper gives
        the end of the phase-out, the epoch before that drop, but not its start: half of its end is taken.
        """
        first_drop = epochs / 2 if first_drop is None else first_drop
        end = max(0.0, first_drop - epochs / REFERENCE_EPOCHS) if self.dyrelu_end is None else self.dyrelu_end
        length = epochs * 50 / REFERENCE_EPOCHS
        defaults: dict[str, Any] = dict(
            cyclic_length=length,
            cyclic_update_frequency=cyclic_frequency(
                epochs * steps_per_epoch, steps_per_epoch * (self.cyclic_length or length)
            ),
            dyrelu_end=end,
            dyrelu_start=end / 2,
            dyrelu_blend="outputs",
            share_scale="one",
            **dict.fromkeys((*SWITCHES, "cyclic_replace", "cyclic_open", "dyrelu_late"), False),
        )
        values: dict[str, Any] = {n: defaults.get(n) if value is None else value for n, value in vars(self).items()}
        return ResolvedEast(**values)


@dataclass(frozen=True, kw_only=True)
class ResolvedEast(EastOptions):
    """EAST's options for one run: every switch and number is known."""

    cyclic: bool
    cyclic_length: float
    cyclic_update_frequency: int
    cyclic_replace: bool
    cyclic_open: bool
    dyrelu: bool
    dyrelu_blend: str
    dyrelu_late: bool
    dyrelu_start: float
    dyrelu_end: float
    share: bool
    share_scale: str

    def density_schedule(
        self, target: float, steps_per_epoch: int, frequency: int | None, end: float
    ) -> Constant | Cyclic:
        """The density schedule; `frequency` and `end` as in `plugins.density`."""
        if not self.cyclic:
            return Constant(target, frequency, end)
        length = self.cyclic_length * steps_per_epoch
        if length == math.inf:
            raise UsageError(f"{flag('cyclic_length')} must be a number of epochs of the run, got {self.cyclic_length}")
        numbers: dict[str, Any] = dict(
            multiplier=self.cyclic_multiplier,
            cycles=self.cyclic_cycles,
            length=max(2, round(length)),
            length_mult=self.cyclic_length_mult,
            pattern=self.cyclic_pattern,
            cyclic_frequency=self.cyclic_update_frequency,
            replace=self.cyclic_replace,
        )
        try:
            kind = OpenCyclic if self.cyclic_open else Cyclic
            return kind(target, frequency=frequency, end=end, **numbers)
        except UsageError as error:
            message = str(error).replace("`cyclic_frequency`", flag("cyclic_update_frequency"))
            raise UsageError(rename(message, numbers, "east_cyclic_")) from error

    def phase_out(self, steps_per_epoch: int) -> PhaseOut:
        """The phase-out, in steps."""
        from ..plugins.activation.phased import PhaseOut

        start, end = (round(epoch * steps_per_epoch) for epoch in (self.dyrelu_start, self.dyrelu_end))
        try:
            return PhaseOut(start, end)
        except UsageError as error:
            raise UsageError(rename(str(error), {"start": start, "end": end}, "east_dyrelu_")) from error


def scaled_steps(reference: int, total_steps: float) -> int:
    """Steps that take the same part of a run of `total_steps` as `reference` took of Table B.1's; at least 1."""
    return max(1, round(reference * total_steps / REFERENCE_STEPS))


def cyclic_frequency(total_steps: float, cycle: float) -> int:
    """Steps between updates inside cycles of `cycle` steps: scaled as `scaled_steps` does, but at least ten or a
    quarter of a short cycle, since what is grown must be trained before it is judged."""
    return max(scaled_steps(350, total_steps), round(min(10, cycle / 4)))


def flag(field: str) -> str:
    """A field as messages name it, for `flags.spoken`."""
    return f"`east_{field}`"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--east-*` flags; ones that are not given leave no trace in the namespace."""
    group = parser.add_argument_group("EAST (each flag works alone)")
    group.add_argument(
        "--east", action="store_true", default=argparse.SUPPRESS, help="all three tricks with the paper's defaults"
    )
    group.add_argument(
        "--east-config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with these options as keys"
    )
    flags.add_flags(group, EastOptions, prefix="east_")


def from_flags(given: Mapping[str, Any]) -> EastOptions:
    """Options from parsed flags: `given` maps `east`, `east_config`, `east_cyclic_length`, ... to values.

    They go before the file of `east_config`. Raises `UsageError` for a flag whose trick is not on, or an unreadable
    file.
    """
    values = told(given)
    options = EastOptions(**values)
    options.check_used(values)
    return options


def told(given: Mapping[str, Any]) -> dict[str, Any]:
    """What parsed flags say of EAST, the file of `east_config` among them, by field names."""
    names = {field.name for field in dataclasses.fields(EastOptions)}
    file = _read_file(given["east_config"]) if given.get("east_config") else {}
    values = {**file, **{name: given[f"east_{name}"] for name in names if f"east_{name}" in given}}
    return {**dict.fromkeys(SWITCHES, True), **values} if given.get("east") else values


def _read_file(path: str) -> dict[str, Any]:
    """Option names to values, as their flags would give them; a switch may be false as well."""
    parser = flags.Parser(add_help=False)
    flags.add_flags(parser, EastOptions)
    content = read_yaml(path, "--east-config")
    content = {str(key).replace("-", "_").removeprefix("east_"): value for key, value in content.items()}
    arguments = flags.as_arguments(content, parser, f"--east-config {path}")
    for key in SWITCHES:
        if not isinstance(content.get(key), bool | None):
            raise UsageError(f"--east-config {path}: {key} must be true or false, got {content[key]!r}")
    try:
        given = vars(parser.parse_args(arguments))
    except UsageError as error:
        raise UsageError(f"--east-config {path}: {str(error).removeprefix('--')}") from error
    return {**given, **{key: False for key in SWITCHES if content.get(key) is False}}
