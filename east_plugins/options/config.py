"""What one training run is: what was asked for (`Config`), and what that means in numbers (`Resolved`)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..plugins import registry
from ..plugins.protocols import Companion, DensitySchedule, RateDecay
from . import checks, east, methods, plugged
from .east import EastOptions, ResolvedEast, scaled_steps
from .flags import check_choices, option
from .inherit import Origins


def _epochs(text: str) -> list[float]:
    """`75,150` as numbers; `none` as no epoch at all."""
    try:
        return [] if text in ("", "none") else [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be epochs joined by commas, or none, got {text!r}") from None


def _whole_epochs(text: str) -> list[int]:
    """`1,10` as whole numbers."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers joined by commas, got {text!r}") from None


def _loggers(text: str) -> list[str]:
    """`csv,wandb` as names; `none` as no name at all."""
    return [] if text in ("", "none") else text.split(",")


#: Settings that neither method nor recipe nor the run's length decides.
_DEFAULTS: dict[str, Any] = dict(
    density=0.001, growth="random", death="magnitude", redistribution="none", structure="none", death_rate=0.5,
    sparse_init="ERK", weight_init="default", prune_scope="local", prune_rounding="floor", last_update=False,
    density_schedule="constant", decay_schedule="cosine",
    dctps=False, validation_split="stratified", crop_padding="zero", bias_free_head=False, tested="best",
    nesterov=False,
)  # fmt: skip

_METHOD_HELP = (
    f"method, with +trick for each addition: {', '.join(methods.METHODS)}; tricks: {', '.join(methods.TRICKS)}"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is asked of `train`, with ITOP's names where it has them. None: the method or the run's length decides.

    `plugin_options` are the options of plugins that are named here: `growth_tau` is option `tau` of the growth rule.
    Raises `UsageError` for a value that cannot be, whoever makes it.
    """

    method: str = option("east", _METHOD_HELP)
    recipe: str | None = option(
        None,
        f"how the method is trained: {', '.join(methods.RECIPES)}; what is given by hand goes before it (default: east "
        "for method east, and for all that compare sets beside it, else paper)",
    )
    model: str = option("resnet34", "network, see `info --model help`")
    width: int | None = option(None, "channels of the network's stem (default: its own, 64 in resnet34)", type=int)
    data: str = option(
        "digits", "digits, mnist, fashionmnist, cifar10, cifar100, tinyimagenet, imagenet, folder, table or openml:NAME"
    )
    data_dir: str | None = option(None, "folder that the data lies in", metavar="DIR")
    image_size: int | None = option(None, "pixels of an image's side (default: the data's own)", type=int)
    download: bool = option(False, "fetch the data into --data-dir first, where torchvision can")
    limit: int | None = option(None, "train on so many images only; all test images stay", type=int)
    validation: float = option(0.1, "share of the training images that chooses the checkpoint", type=float)
    validation_split: str | None = option(
        None, "which ones: stratified by class at random, or the last ones in the data's order (default: stratified)",
        choices=["stratified", "last"],
    )  # fmt: skip
    crop_padding: str | None = option(
        None, "what random crops find beyond an image's edge: zeros or its reflection (default: zero)",
        choices=["zero", "reflect"],
    )  # fmt: skip
    bias_free_head: bool | None = option(None, "the classifier, the last linear layer, has no bias", switch=True)
    tested: str | None = option(
        None, "network that is tested: of the best epoch by validation, or of the last (default: best)",
        choices=["best", "last"],
    )  # fmt: skip

    start: str | None = option(
        None, "weights to begin with: a run's folder, or a file of a state dict; a head of other classes begins anew",
        metavar="PATH",
    )  # fmt: skip

    density: float | None = option(None, "active share of the maskable weights (default: 0.001)", type=float)
    growth: str | None = option(
        None,
        "growth rule: gradient, averaged_gradient, memory, momentum, momentum_neuron, random, random_unfired, ch3-l3, "
        "or module:name (default: the method's; rigl, east: gradient, set: random)",
    )
    death: str | None = option(
        None,
        "prune rule: magnitude, SET, threshold, random, taylor, Taylor_FO, MEST, SNIP, RunningSNIP, RunningMagnitude, "
        "sensitivity, rsensitivity, ReciprocalSensitivity, dormant, bilevel, or module:name (default: the method's; "
        "set, rigl, east: magnitude)",
    )
    redistribution: str | None = option(
        None,
        "redistribution rule: none, magnitude, momentum, nonzeros, or module:name (default: of the method, or none)",
    )
    structure: str | None = option(
        None,
        "how active weights lie in a layer: none, channels, diagonals, fan-in, or module:name (default: of the method)",
    )
    death_rate: float | None = option(
        None, "share of the active weights replaced in an update (default: 0.5)", type=float
    )
    fix: bool = option(False, "the topology is never updated, as with ITOP's flag of that name")
    decay_schedule: str | None = option(
        None, "decay of the death rate: cosine, linear, constant, stepped or elastic (default: cosine)"
    )
    update_frequency: int | None = option(
        None, "steps between topology updates (default: SET 1500, RigL and EAST 4000 of 250 epochs' steps)", type=int,
        counted=True,
    )  # fmt: skip
    sparse_init: str | None = option(
        None,
        "allocation: ERK, ERK-floor, ER, EPL, EPF, uniform, first-blocks, connected, separable, synflow, snip, grasp, "
        "force, iter_snip, magnitude, pruned, resume, lottery_ticket, or module:name (default: of the method, or ERK)",
    )
    weight_init: str | None = option(
        None, "initial values; sparse-fan-in scales them for the active fan-in", choices=["default", "sparse-fan-in"]
    )
    quiet_branches: str | None = option(
        None, "residual branches whose last norm's scale starts at zero: all, or loops, those of blocks without a "
        "projection (default: none)", choices=["all", "loops"],
    )  # fmt: skip
    prune_scope: str | None = option(
        None, "prune per layer; global: what a falling density drops is found over all layers; all: what is replaced, "
        "too (default: local)", choices=["local", "global", "all"],
    )  # fmt: skip
    prune_rounding: str | None = option(
        None, "the share of a layer that is replaced as a whole number (default: floor; ITOP: ceil)",
        choices=["floor", "ceil"],
    )  # fmt: skip
    last_update: bool | None = option(None, "a topology update may come at the very last step, as in ITOP", switch=True)
    keep_connected: bool = option(False, "updates keep weights on input-to-output paths")
    density_schedule: str | None = option(
        None, "density over time without cycles: constant, gradual or one-shot (default: of the method)"
    )
    dctps: bool | None = option(None, "DCTpS layers: a fixed DCT matrix plus the sparse weights", switch=True)
    dctps_engine: str = option(
        "dense", "how DCTpS layers are computed; auto measures, dense repeats bit for bit",
        choices=["auto", "dense", "fft", "separable"],
    )  # fmt: skip
    companion: str | None = option(
        None,
        "beside dropping and growing: topkast, suptickets, or module:name (default: of the method)",
        metavar="NAME",
    )
    transform: str | None = option(None, "model transform of your own, module:function", metavar="NAME")

    epochs: int = option(250, "passes over the training images", type=int)
    limit_steps: int | None = option(
        None, "stop after so many steps: to see that a run works; it is left unfinished, and --resume goes on with it",
        type=int, metavar="N",
    )  # fmt: skip
    batch_size: int = option(128, "images a step", type=int)
    update_batch: int | None = option(
        None,
        "images of a batch of its own whose gradient a topology update's rules see (default: the step's)",
        type=int,
    )
    optimizer: str = option("sgd", "optimizer", choices=["sgd", "adam", "adamw"])
    lr: float | None = option(None, "learning rate (default: 0.1 for sgd, 0.001 for adam and adamw)", type=float)
    lr_drops: list[float] | None = option(
        None,
        "epochs of tenfold drops of the rate (default: at a half and three quarters; adam: none)",
        type=_epochs,
        counted=True,
        metavar="E,E",
    )
    momentum: float = option(0.9, "momentum of sgd", type=float)
    warmup: float = option(0.0, "epochs in which the rate rises from a tenth to itself", type=float, counted=True)
    nesterov: bool | None = option(None, "Nesterov momentum", switch=True)
    clip_norm: float | None = option(
        None, "largest norm of the gradient; longer ones are cut (default: none)", type=float
    )
    clip_norm_of: str | None = option(
        None, "gradients that the norm counts: those of active weights, or all, as in published scripts (default: all)",
        choices=["active", "all"],
    )  # fmt: skip
    weight_decay: float = option(1e-4, "L2 regularisation", type=float, aliases=["--l2"])
    seed: int = option(0, "seed of everything random", type=int)
    order_seed: int | None = option(None, "seed of the images' order and crops (default: --seed)", type=int)
    on_nonfinite: str = option(
        "warn", "a loss that is NaN or infinite: stop, where no such network is saved, or warn at the epoch's end",
        choices=["warn", "stop"],
    )  # fmt: skip
    signals: bool = option(
        False, "gradient flow and positive inputs of the ReLUs at ends of epochs, for analyze --plot; left out where "
        "they would take over 3 % of the time"
    )  # fmt: skip
    loggers: list[str] | None = option(
        None, f"where figures of every epoch go beside metrics.jsonl: {', '.join(checks.LOGGERS)}, joined by commas, "
        "or none (default: tensorboard where it is installed)", type=_loggers, metavar="NAME,NAME",
    )  # fmt: skip
    save_every: float | None = option(
        None, "minutes between checkpoints, inside epochs too (default: at ends of epochs, 30 seconds or more apart)",
        type=float, metavar="MIN",
    )  # fmt: skip
    keep_weights: list[int] | None = option(
        None, "epochs whose weights at their end are kept, in weights-E.pt; 0: those that training begins with",
        type=_whole_epochs, metavar="E,E",
    )  # fmt: skip
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    threads: int | None = option(None, "CPU threads (default: PyTorch's choice)", type=int)
    engine: str = option(
        "auto", "how passes are computed: densely, for active weights only, or the faster as measured once on "
        "the machine", choices=["auto", "dense", "sparse"],
    )  # fmt: skip
    compile: bool = option(False, "training passes by torch.compile, dense (--engine dense); needs a C compiler")
    cuda_graph: bool = option(
        False, "forward and backward as one CUDA graph, dense (--engine dense): small networks wait for Python else"
    )
    amp: bool = option(False, "bfloat16 autocast")
    channels_last: bool = option(False, "channels-last memory format")
    east: EastOptions = EastOptions()
    plugin_options: Mapping[str, Any] = field(default_factory=dict)
    origins: Origins = field(default=Origins(), compare=False, repr=False)  #: for messages only

    def __post_init__(self) -> None:
        methods.preset(self.method, self.dctps)
        check_choices(self)
        checks.check(self)

    @property
    def has_momentum(self) -> bool:
        """Whether the optimizer is SGD with momentum."""
        return self.optimizer == "sgd" and self.momentum > 0

    @property
    def preset(self) -> methods.Preset:
        """What the method's name stands for."""
        return methods.preset(self.method, self.dctps)

    def as_dict(self) -> dict[str, Any]:
        """Flag names to values, as `--config` reads them."""
        skipped = ("east", "plugin_options", "origins", "steps_per_epoch")
        values = {name: value for name, value in vars(self).items() if name not in skipped and value is not None}
        values |= {f"east_{name}": value for name, value in self._told_of_east().items()}
        values |= self.plugin_options
        return {name.replace("_", "-"): value for name, value in values.items()}

    def _told_of_east(self) -> dict[str, Any]:
        defaults = {field.name: field.default for field in dataclasses.fields(EastOptions)}
        return {name: value for name, value in vars(self.east).items() if value != defaults[name]}

    def chosen(self) -> dict[str, str | None]:
        """The plugin of each kind that is asked for, by the method where not by hand."""
        named = {name: getattr(self, name) for name in plugged.BY_SETTING if not name.startswith("east_")}
        asked = {name: value for name, value in named.items() if value is not None}
        known = {"sparse_init": "ERK", "decay_schedule": "cosine", **self._recipe(), **self.preset.settings}
        return {**known, **asked, "east_dyrelu_type": self.east.dyrelu_type}

    def _recipe(self) -> dict[str, Any]:
        """What the recipe says, as far as it concerns this run."""
        values = methods.RECIPES[self.recipe or methods.default_recipe(self.method)].values()
        if self.optimizer != "sgd":
            values.pop("lr_drops", None)
        if not self.has_momentum:
            values.pop("nesterov", None)
        if not self.east.has_coefficients:
            values.pop("east_dyrelu_blend", None)
        return values

    def decided(self, name: str) -> Any:
        """The value of a setting that does not depend on the run's length: asked for, of the method, of the recipe, or
        the default."""
        asked = getattr(self, name)
        if asked is not None:
            return asked
        return self.preset.settings.get(name, self._recipe().get(name, _DEFAULTS.get(name)))

    def resolve(self, steps_per_epoch: int) -> Resolved:
        """All defaults filled in for a run of `epochs` times `steps_per_epoch` steps (Table B.1, scaled).

        What is asked for goes before what the method stands for, and that before the defaults. Raises `UsageError`
        where settings contradict each other or the method.
        """
        with self.origins.told():
            return self._resolve(steps_per_epoch)

    def _resolve(self, steps_per_epoch: int) -> Resolved:
        total, preset, recipe = self.epochs * steps_per_epoch, self.preset, self._recipe()
        adam = self.optimizer != "sgd"
        drops = () if adam else recipe.pop("lr_drops", (0.5, 0.75))
        defaults = {
            **_DEFAULTS,
            "lr": 0.001 if adam else 0.1,
            "lr_drops": [self.epochs * drop for drop in drops],
        }
        if preset.update is not None and not self.fix:
            defaults["update_frequency"] = scaled_steps(preset.update, total)
        asked = {name: value for name, value in vars(self).items() if value is not None}
        fields = {field.name for field in dataclasses.fields(self)}
        ours = {name: value for name, value in {**recipe, **preset.settings}.items() if name in fields}
        values = {**vars(self), **defaults, "recipe": methods.default_recipe(self.method), **ours, **asked}
        values["east"] = self._resolve_east(preset, recipe, steps_per_epoch, min(values["lr_drops"], default=None))
        values["plugin_options"] = self._resolve_options(values)
        found = Resolved(**values, steps_per_epoch=steps_per_epoch)
        found.schedule()
        found.companions()
        found.rate_decay()
        return found

    def _resolve_east(
        self, preset: methods.Preset, recipe: Mapping[str, Any], steps_per_epoch: int, first_drop: float | None
    ) -> ResolvedEast:
        switches = {name: preset.settings.get(f"east_{name}", False) for name in east.SWITCHES}
        given = {name: value for name, value in switches.items() if getattr(self.east, name) is None}
        asked = dataclasses.replace(self.east, **given)
        asked.check_used()
        ours = {name.removeprefix("east_"): value for name, value in recipe.items() if name.startswith("east_")}
        on = {name: value for name, value in ours.items() if getattr(asked, name.split("_")[0])}
        asked = dataclasses.replace(asked, **{n: value for n, value in on.items() if getattr(asked, n) is None})
        found = asked.resolve(self.epochs, steps_per_epoch, first_drop)
        if found.dyrelu and self.east.dyrelu_end is None and round(found.dyrelu_end * steps_per_epoch) < 1:
            raise UsageError(
                f"`epochs` {self.epochs}: a run of {self.epochs * steps_per_epoch} steps is too short for the "
                f"phase-out of `method` {self.method}, which must end before the first learning-rate drop"
            )
        return found

    def _resolve_options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {name: values.get(name) for name in plugged.BY_SETTING}
        chosen["east_dyrelu_type"] = values["east"].dyrelu_type if values["east"].dyrelu else None
        known = dict(plugged.fields(chosen))
        ours = {name: value for name, value in self.preset.settings.items() if name in known}
        return plugged.resolved({**ours, **self.plugin_options}, chosen)


@dataclass(frozen=True, kw_only=True)
class Resolved(Config):
    """A run in numbers: nothing that decides what is trained is left open."""

    density: float
    growth: str
    death: str
    redistribution: str
    structure: str
    death_rate: float
    sparse_init: str
    weight_init: str
    prune_scope: str
    density_schedule: str
    decay_schedule: str
    dctps: bool
    validation_split: str
    crop_padding: str
    bias_free_head: bool
    tested: str
    prune_rounding: str
    last_update: bool
    nesterov: bool
    lr: float
    lr_drops: list[float]
    east: ResolvedEast
    steps_per_epoch: int

    @property
    def static(self) -> bool:
        """Whether the topology is never updated."""
        return self.preset.static or self.fix

    @property
    def label(self) -> str:
        """The method's name, with what differs from it."""
        own = {f"east_{name}": value for name, value in vars(self.east).items()}
        return methods.label(self.method, {**vars(self), **own, **self.plugin_options})

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def schedule(self) -> DensitySchedule:
        """The density over the run; raises `UsageError` where its numbers cannot be."""
        frequency = None if self.static else self.update_frequency
        end = self.steps + self.last_update
        if self.density_schedule == "constant":
            return self.east.density_schedule(self.density, self.steps_per_epoch, frequency, end)
        options = self.options_of("density_schedule")
        make = registry.density.bound(self.density_schedule, options)
        try:
            return make(self.density, frequency=frequency, end=end)
        except UsageError as error:
            raise UsageError(plugged.rename(str(error), options, "density_schedule_")) from error

    def rate_decay(self) -> RateDecay:
        """The prune rate over the run."""
        options = self.options_of("decay_schedule")
        make = registry.rate.bound(self.decay_schedule, options)
        try:
            return make(self.death_rate, self.steps)
        except UsageError as error:
            raise UsageError(plugged.rename(str(error), options, "decay_schedule_")) from error

    def companions(self) -> list[Companion]:
        """The plugin that the method brings along for its host, new; none for most."""
        if self.companion is None:
            return []
        options = self.options_of("companion")
        try:
            return [registry.companion.bound(self.companion, options)(self.steps)]
        except UsageError as error:
            raise UsageError(plugged.rename(str(error), options, "companion_")) from error

    def options_of(self, setting: str) -> dict[str, Any]:
        """The options of the plugin that a setting names, under the plugin's own names."""
        return plugged.BY_SETTING[setting].values(self.plugin_options)

    def _told_of_east(self) -> dict[str, Any]:
        """Switches, off as well as on, and the numbers of what is on."""
        on = vars(self.east)
        return {name: value for name, value in on.items() if name in east.SWITCHES or on[name.split("_")[0]]}
