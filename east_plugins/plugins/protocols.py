"""What a plugin is: one contract for each kind, and what a rule sees of a layer.

A plugin is a function, or a frozen dataclass whose instances are called in its place. Fields of such a dataclass that
`option` makes are the plugin's own options: they become flags (`--growth x --growth-tau 0.1`), keys of configuration
files, and lines of help, for built-in plugins, `module:name` and entry points alike.

    @growth.register("mine", needs=("grad",))
    @dataclass(frozen=True)
    class Mine:
        "Largest gradients, those of small weights first."

        tau: float = option(0.1, "weights up to this size count as small", type=float)

        def __call__(self, layer: Layer) -> Tensor:
            return layer.grad.abs() / (layer.weight.abs() + self.tau)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from ..errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: What a rule may declare that it needs of a layer: the dense gradient of the loss, its running average, its mean over
#: the last few steps, the values that inactive weights had, or, a prune rule, the running average of what its own
#: `score` says of the active weights at every step.
Need = Literal["grad", "momentum", "mean_grad", "memory", "average"]
NEEDS: tuple[str, ...] = get_args(Need)


def option(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field with what `argparse` needs to make a flag of it (`type`, `choices`, `metavar`, `aliases`); one
    with a default of True or False becomes a switch. `counted=True`: it is counted in epochs or steps, so that a
    configuration file's value is scaled with `--epochs`."""
    return dataclasses.field(default=default, metadata={"help": help, **flag})


def options_of(plugin: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a plugin's class that `option` made; none where it is no dataclass."""
    if not dataclasses.is_dataclass(plugin):
        return ()
    return tuple(field for field in dataclasses.fields(plugin) if "help" in field.metadata)


@dataclass
class Layer:
    """One maskable weight, offered to growth, prune and redistribution rules.

    `weight`, `mask` (bool, True is active) and `fired` (bool, active at least once so far) have the weight's
    shape. `grad` is the dense gradient of the loss and `momentum` its dense running average
    `m <- beta * m + grad`, kept for rules registered with `needs=("momentum",)`; `average` is that of a prune rule's
    own `score`, of active weights only, for `needs=("average",)`. `mean_grad` is the mean of the dense gradients of as
    many steps, up to this one, as the rule's attribute `batches` says, for `needs=("mean_grad",)`; `memory` the weight
    with, where it is inactive, the value that it had when it was dropped, or at first, for `needs=("memory",)`: with
    such a rule weights begin with that value again. `generator` is a CPU generator, the same on every rank, for rules
    that draw numbers of their own.
    """

    name: str
    weight: Tensor
    mask: Tensor
    fired: Tensor
    generator: torch.Generator
    dense_grad: Tensor | None = None
    dense_momentum: Tensor | None = None
    score_average: Tensor | None = None
    dense_mean: Tensor | None = None
    remembered: Tensor | None = None

    def at(self, places: Tensor) -> Layer:
        """The same of some of its weights, in one dimension: those at these flat indices."""
        names = {each.name for each in dataclasses.fields(self)} - {"name", "generator"}
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{name: tensor.take(places) for name, tensor in tensors.items()})

    @property
    def grad(self) -> Tensor:
        """Dense gradient of the loss, all ranks averaged; raises `UsageError` where none was computed."""
        return self._require(self.dense_grad, "gradient: declare needs=('grad',), and step after backward()")

    @property
    def momentum(self) -> Tensor:
        """Dense running average of gradients; raises `UsageError` before the first step."""
        return self._require(self.dense_momentum, "momentum: declare needs=('momentum',)")

    @property
    def average(self) -> Tensor:
        """Running average of the prune rule's own score, 0 where inactive; raises `UsageError` before a step."""
        return self._require(self.score_average, "running average of scores: declare needs=('average',)")

    @property
    def mean_grad(self) -> Tensor:
        """Mean of the last steps' dense gradients, all ranks averaged; raises `UsageError` where none was kept."""
        return self._require(self.dense_mean, "mean gradient: declare needs=('mean_grad',), and step after backward()")

    @property
    def memory(self) -> Tensor:
        """The weight, with former values where it is inactive; raises `UsageError` where none are kept."""
        return self._require(self.remembered, "memory: declare needs=('memory',)")

    def _require(self, tensor: Tensor | None, what: str) -> Tensor:
        if tensor is None:
            raise UsageError(f"layer {self.name} has no {what}")
        return tensor


class GrowthRule(Protocol):
    """One score a weight; the host grows the inactive ones with the highest, exactly as many as it wants."""

    def __call__(self, layer: Layer, /) -> Tensor: ...


class PruneRule(Protocol):
    """The importance of every weight; the host drops the active ones with the lowest. `inf`: do not replace.

    A rule registered with `pointwise=True` says that a weight's importance depends on no other weight: it gets layers
    of active weights only, of one dimension.

    Two methods are called where a rule has them: `over_layers(layers)`, for importances of several layers that are to
    be compared with one another, and, of a rule that needs "average", `score(layer)` after every step.
    """

    def __call__(self, layer: Layer, /) -> Tensor: ...


class RedistributionRule(Protocol):
    """A layer's share of the weights grown in one update, a number >= 0."""

    def __call__(self, layer: Layer, /) -> Tensor | float: ...


@dataclass(frozen=True)
class Candidate:
    """One layer of which a structure chooses the mask.

    Attributes:
        layer: as rules see it, before the update.
        budget: active weights that it may have.
        rate: share of its weights that is replaced, in [0, 1].
    """

    layer: Layer
    budget: int
    rate: float
    prune: Callable[[Layer], Tensor]
    grow: Callable[[Layer], Tensor]
    whole: Callable[[float], int] = int

    @property
    def importance(self) -> Tensor:
        """What the prune rule says of every weight; made anew at every look."""
        return self.prune(self.layer)

    @property
    def growth(self) -> Tensor:
        """What the growth rule says of every weight; made anew at every look."""
        return self.grow(self.layer)

    def kept(self, count: int) -> int:
        """How many of `count` weights are not replaced."""
        return count - self.whole(self.rate * count)


@dataclass(frozen=True)
class Moment:
    """When and where a structure is updated.

    Attributes:
        generator: CPU generator, the same on every rank.
        progress: share of the run that is over, in [0, 1]; None where the density schedule has no end.
        model: whose layers these are, without wrappers.
        input_shape: of one input without the batch, where the host was told.
    """

    generator: torch.Generator
    progress: float | None
    model: nn.Module
    input_shape: tuple[int, ...] | None


class Structure(Protocol):
    """How active weights lie in a layer, which prune and growth rule alone cannot say: it chooses the masks.

    `start` draws a mask to begin with, a boolean CPU tensor of at most `budget` active weights; raises `UsageError`
    where no mask of the structure is so small. `update` returns the new masks of all layers, which have at most the
    budgets' sum of active weights, none of them nothing. A structure whose attribute `follows` is true needs the
    shape of an input and a schedule with an end.
    """

    def start(self, shape: Sequence[int], budget: int, generator: torch.Generator, /) -> Tensor: ...

    def update(self, layers: Sequence[Candidate], moment: Moment, /) -> Sequence[Tensor]: ...


class LayerShare(Protocol):
    """An allocation that knows a layer's shape only, or where it stands (`allocation.position.Place`; registered with
    `places=True`): the layer's weight in the split of the active weights."""

    def __call__(self, shape: Any, /) -> float: ...


class LayerCounts(Protocol):
    """An allocation (registered with `counts=True`) that says itself how many weights each layer has, of `wanted` over
    all; `start`: in the masks that training begins with. Their sum may differ from `wanted`."""

    def __call__(self, shapes: Mapping[str, Sequence[int]], wanted: float, start: bool, /) -> dict[str, int]: ...


class MaskDraw(Protocol):
    """An allocation that draws masks itself (registered with `draws=True`): boolean CPU tensors with `budgets[name]`
    active weights each, or with their sum over all where it is registered with `keeps_counts=True`. One registered
    with `needs_data=True` gets a fifth argument, the `allocation.sample.Sample` of the training data."""

    def __call__(
        self, model: nn.Module, budgets: Mapping[str, int], input_shape: Sequence[int], generator: torch.Generator,
        /, *data: Any,
    ) -> dict[str, Tensor]: ...  # fmt: skip


class DensitySchedule(Protocol):
    """The global density as a pure function of the step, and the steps (counted from 1) after which the topology is
    updated. Built as `schedule(target, frequency=..., end=..., **options)`: the final density, steps between updates
    (None: never), and the run's last step. A schedule whose attribute `replaces` is False only grows or only drops; one
    with a method `rate(step)` says there what share of the weights an update replaces, None: the prune rate."""

    @property
    def target(self) -> float: ...

    def density(self, step: int, /) -> float: ...

    def due(self, step: int, /) -> bool: ...


class RateDecay(Protocol):
    """The prune rate as a pure function of the step, in [0, 1]. Built as `decay(initial, steps, **options)`."""

    def __call__(self, step: int, /) -> float: ...


class ActivationFactory(Protocol):
    """The module that stands in for a ReLU of `num_channels` channels: same shapes in and out, channels second."""

    def __call__(self, num_channels: int, /) -> nn.Module: ...


class Transform(Protocol):
    """A change of a model before its optimizer is made: in place, or the model to take in its place."""

    def __call__(self, model: nn.Module, /, *args: Any, **options: Any) -> Any: ...


class HostPlugin(Protocol):
    """Called with the host at the end of every step, after the topology update.

    Methods that are called where a plugin has them: `begin(host)` once the masks are in place, `before(host)` before
    every optimizer step, with its gradients, and `state_dict()` and `load_state_dict(state)` with the host's own.
    """

    def __call__(self, host: Any, /) -> None: ...


class Companion(HostPlugin, Protocol):
    """What a method does beside dropping and growing weights: a host plugin by name. Built as `companion(steps,
    **options)`, `steps` the run's last one."""
