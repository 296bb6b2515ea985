"""What a method's name stands for: one typed record for each method and each `+trick`, the same for command line and
Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Preset:
    """Settings that a name stands for, by the names of `Config` (EAST's with `east_`), and where they come from.

    `update` is the number of steps between topology updates in Table B.1's run of 88,000 steps, scaled to the run.
    A `static` method has no topology updates.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    update: int | None = None
    static: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def with_(self, other: Preset) -> Preset:
        """Both, `other` going before."""
        update = self.update if other.update is None else other.update
        return Preset(self.source, {**self.settings, **other.settings}, update, self.static or other.static)

    def without(self, name: str) -> Preset:
        settings = {key: value for key, value in self.settings.items() if key != name}
        return Preset(self.source, settings, self.update, self.static)


_RIGL = dict(growth="gradient", death="magnitude")

METHODS: dict[str, Preset] = {
    "dense": Preset("all weights active", dict(density=1.0), static=True),
    "static": Preset("a random mask, never updated", static=True),
    "snip": Preset("Lee et al. 2019", dict(sparse_init="snip"), static=True),
    "grasp": Preset("Wang et al. 2020", dict(sparse_init="grasp"), static=True),
    "force": Preset("de Jorge et al. 2021", dict(sparse_init="force"), static=True),
    "iter_snip": Preset("de Jorge et al. 2021; Verdenius et al. 2020", dict(sparse_init="iter_snip"), static=True),
    "synflow": Preset("Tanaka et al. 2020", dict(sparse_init="synflow"), static=True),
    "set": Preset("Mocanu et al. 2018", dict(growth="random", death="magnitude"), update=1500),
    "rigl": Preset("Evci et al. 2020", _RIGL, update=4000),
    "snfs": Preset(
        "Dettmers and Zettlemoyer 2019",
        dict(growth="momentum", death="magnitude", redistribution="momentum"),
        update=352,
    ),
    "gmp": Preset(
        "Zhu and Gupta 2017: every layer to the same density, nothing grows",
        dict(
            growth="random",
            death="magnitude",
            death_rate=0.0,
            sparse_init="uniform",
            density_schedule="gradual",
            density_schedule_initial=1.0,
        ),
        update=1000,
    ),
    "granet": Preset(
        "Liu et al. 2021, Algorithm 1; from half of the weights, up to epoch 110 of 160",
        dict(_RIGL, prune_scope="global", density_schedule="gradual", density_schedule_until=0.6875),
        update=1000,
    ),
    "mest": Preset(
        "Yuan et al. 2021: MEST with elastic mutation; every 5 of 160 epochs",
        dict(growth="random", death="MEST", death_rate=0.2, decay_schedule="elastic"),
        update=2750,
    ),
    "topkast": Preset(
        "Jayakumar et al. 2020; sets chosen anew every 100 steps",
        dict(
            growth="memory",
            death="magnitude",
            death_rate=1.0,
            decay_schedule="constant",
            density_schedule="topkast",
            companion="topkast",
        ),
        update=100,
    ),
    "suptickets": Preset(
        "Yin et al. 2022: tickets of RigL",
        dict(_RIGL, density_schedule="suptickets", companion="suptickets", tested="last", last_update=False),
        update=1000,
    ),
    "srigl": Preset(
        "Lasby et al. 2024: constant fan-in, neurons ablated below gamma_sal 0.3",
        dict(_RIGL, structure="fan-in", structure_gamma_sal=0.3, death_rate=0.3),
        update=100,
    ),
    "chase": Preset(
        "Yin et al. 2023: half of the channels removed by 0.8 of the run, weights move over all layers",
        dict(_RIGL, structure="channels", structure_remove=0.5, structure_least=0.5, structure_until=0.8),
        update=1000,
    ),
    "cht": Preset(
        "Zhang et al. 2024: grown where paths of length 3 say, without gradients, after every epoch",
        dict(growth="ch3-l3", death="magnitude", death_rate=0.3, weight_init="sparse-fan-in"),
        update=352,
    ),
    "neurrev": Preset(
        "after Li et al. 2024, NeurRev: negative weights of dormant neurons pruned first",
        dict(growth="random", death="dormant", death_tau=0.01),
        update=1500,
    ),
    "dynadiag": Preset(
        "after Tyagi et al. 2025: whole diagonals, by mean magnitude and mean gradient",
        dict(_RIGL, structure="diagonals"),
        update=100,
    ),
    "open": Preset(
        "whole kernels and pairs of channels in turn on the shortest path, blocks that start silent (RESULTS.md)",
        dict(sparse_init="separable", weight_init="sparse-fan-in", quiet_branches="loops"),
        static=True,
    ),
    "east": Preset("Li et al., EAST", dict(_RIGL, east_cyclic=True, east_dyrelu=True, east_share=True), update=4000),
}

#: What `+NAME` behind a method adds, as in `rigl+dyrelu`.
TRICKS: dict[str, Preset] = {
    "cyclic": Preset("EAST, Section 3.3", dict(east_cyclic=True)),
    "dyrelu": Preset("EAST, Section 3.1", dict(east_dyrelu=True)),
    "share": Preset("EAST, Section 3.2", dict(east_share=True)),
    "connected": Preset("every weight on a path", dict(sparse_init="connected", weight_init="sparse-fan-in")),
    "dctps": Preset("Price and Tanner 2021", dict(dctps=True)),
}


#: Allocations by saliency, and what `+connected` adds to them: they stay, weights off path move onto one, and initial
#: values are those that were scored.
SALIENCY = ("snip", "grasp", "force", "iter_snip", "synflow")
REPAIRED = Preset("every weight on a path", dict(sparse_init_connected=True))


@dataclass(frozen=True)
class Recipe:
    """How a method is trained, apart from what it is: settings by the names of `Config`, each with its source. Those
    of a trick that is not on are left out."""

    help: str
    settings: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        return {name: value for name, (value, _) in self.settings.items()}


_ES2 = "ES2, main.py 4722617"
_MEASURED = "RESULTS.md, table 4's order: as measured there"
_ES2_CORE = "ES2, sparselearning/core.py"

#: What the authors' own code does and the paper does not say, or says otherwise.
_AS_ES2: dict[str, tuple[Any, str]] = {
    "lr_drops": ((0.5, 0.75), _ES2),
    "nesterov": (True, _ES2),
    "clip_norm": (1.0, f"{_ES2}: from 9 September 2024 on"),
    "clip_norm_of": ("all", f"{_ES2}: dense gradients of inactive weights count"),
    "sparse_init": ("ERK-floor", f"{_ES2_CORE}: floor 0.01 of the density at the start, none in cycles"),
    "prune_rounding": ("ceil", _ES2_CORE),
    "last_update": (True, _ES2_CORE),
    "bias_free_head": (True, "ES2, sparselearning/models.py"),
    "crop_padding": ("reflect", "ES2, sparselearning/utils.py"),
    "validation_split": ("last", "ES2, sparselearning/utils.py"),
    "tested": ("last", f"{_ES2}: the network of the last epoch"),
    "east_cyclic_replace": (False, _ES2_CORE),
    "east_cyclic_open": (True, f"{_ES2_CORE}: no update closes the cycles"),
    "east_share_scale": ("uniform", "ES2, sparselearning/models.py"),
    "east_dyrelu_blend": ("coefficients", "ES2, sparselearning/dyrelu.py"),
    "east_dyrelu_late": (True, "ES2, sparselearning/dyrelu.py 26bd28e: plain ReLU while beta is 1"),
}

#: What `--recipe` names.
RECIPES: dict[str, Recipe] = {
    "paper": Recipe(
        "the paper's text and Table B.1, as our defaults have them",
        {
            "lr_drops": ((0.5, 0.75), "Section 4: halfway and three quarters; Table B.1 says 75 and 150 of 250"),
            "sparse_init": ("ERK", "Section 4"),
            "nesterov": (False, "not mentioned"),
            "east_cyclic_replace": (False, "Section 3.3: standard updates follow the cyclic phase"),
            "east_cyclic_open": (False, "Algorithm 1 ends at the target"),
            "east_share_scale": ("one", "Section 3.2 names no start"),
            "east_dyrelu_blend": ("outputs", "Section 3.1: of functions"),
        },
    ),
    "es2": Recipe("as the authors' own code ran, newest version", _AS_ES2),
    "east": Recipe(
        "as the authors' own code ran, but cycles close at the target, so that every method has the same count",
        {**_AS_ES2, "east_cyclic_open": (False, _MEASURED)},
    ),
}


def default_recipe(name: str) -> str:
    """The recipe of a method such as `east+connected` where none is asked for."""
    return "east" if name.split("+")[0] == "east" else "paper"


#: The setting that says whether a trick is on, for the tricks that are one switch.
SWITCHES: dict[str, str] = {
    "east_cyclic": "cyclic", "east_dyrelu": "dyrelu", "east_share": "share", "dctps": "dctps",
}  # fmt: skip


def preset(name: str, dctps: bool | None = None) -> Preset:
    """What a method name such as `rigl+connected` stands for.

    On DCTpS layers (`dctps`; None: as the name says) `east` leaves weight sharing out, as the paper does (Section 4).
    Raises `UnknownNameError` for an unknown method, `UsageError` for an unknown trick or one given twice.
    """
    base, *tricks = name.split("+")
    if base not in METHODS:
        raise UnknownNameError("`method`", base, METHODS)
    found = METHODS[base]
    for i, trick in enumerate(tricks):
        if trick not in TRICKS:
            raise UsageError(f"`method` {name}: {UnknownNameError('trick', trick, TRICKS)}")
        if trick in tricks[:i]:
            raise UsageError(f"`method` {name}: trick {trick} is there twice; allowed is once")
        repairs = trick == "connected" and found.settings.get("sparse_init") in SALIENCY
        found = found.with_(REPAIRED if repairs else TRICKS[trick])
    if ("dctps" in tricks if dctps is None else dctps) and "share" not in tricks:
        found = found.without("east_share")
    return found


def label(name: str, values: Mapping[str, Any]) -> str:
    """The method's name as it is true of a run with these settings: switches that are on besides are added as tricks,
    other settings of the method that are not its own stand in brackets, as in `rigl+dyrelu[growth=random]`."""
    own = preset(name, values.get("dctps")).settings
    extra = [trick for setting, trick in SWITCHES.items() if values.get(setting) and not own.get(setting)]
    changed = {key: values[key] for key in own if key in values and values[key] != own[key]}
    changed |= {"fix": True} if values.get("fix") and not preset(name).static else {}
    shown = ",".join(f"{key.removeprefix('east_')}={_plain(value)}" for key, value in changed.items())
    return "+".join([name, *extra]) + (f"[{shown}]" if shown else "")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else ("off" if value is False else str(value))
