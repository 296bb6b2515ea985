"""One interface to the masks of every host, and the exact resizing of somebody else's masks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..ops.select import lowest_k, top_k
from ..ops.swap import Swapped
from ..plugins import registry
from ..plugins.density import Cyclic
from ..plugins.protocols import Layer


class Attached(Protocol):
    """What an adapter, and the methods of its host, need of EAST's attachment to that host."""

    optimizer: Optimizer | None
    cycle: Cyclic | None

    def connect(self, adapter: Adapter) -> Any:
        """Put EAST's moves around the methods of the adapter's host."""

    def making_masks(self, module: nn.Module) -> AbstractContextManager[float]:
        """Around the making of masks; gives the factor by which shared weights raise the density."""

    def resizing(self) -> AbstractContextManager[int | None]:
        """Around the host's own update; gives the active weights that cycles ask for, None without."""

    def frequency(self, step: int) -> int | None:
        """Steps between updates that the host is to believe in at `step`."""

    def stepped(self) -> None:
        """After every step of the host."""


class Driven(Swapped):
    """Mixed into the class of a host: its own methods, with EAST's moves before and after them."""

    east: Attached
    east_adapter: Any  # the host's own kind of adapter


def constructor_parameters(host_class: type) -> list[str]:
    """Names of the parameters of a class's constructor."""
    return list(inspect.signature(host_class.__init__).parameters)[1:]  # type: ignore[misc]


def theirs(bound_super: Any) -> Any:
    """`super()` of a method mixed into a host, whose class a type checker cannot see."""
    return bound_super


class Adapter:
    """A host's masks, fired weights and step, whichever host it is: read, written and saved in one way.

    This base reads hosts that keep float masks by parameter name (`masks`, `modules`, `steps`, `apply_mask`), as
    those of the sparse_learning family do. Upstream hosts replace their mask tensors at every update, so none
    is ever kept: `masks` is read anew.
    """

    #: What messages call the host; an adapter without one is a base of others.
    title = ""
    #: Constructor parameters that tell this host from the others; of several that fit, the longest list decides.
    parameters: frozenset[str] = frozenset()
    #: What is mixed into the class of a connected host.
    driven: type[Driven]
    #: Whether the host moves weights between layers; its layers' shares are then taken as they are.
    redistributes = False
    growth, pruning = "gradient", "magnitude"
    #: Fewest steps between updates that leave the optimizer something to do.
    least_frequency = 1
    #: Weights of layers that the host keeps dense: active, but in no mask.
    dense = 0

    def __init__(self, host: Any):
        self.host = host
        self.fired_masks: dict[str, Tensor] = {}
        self._frequency = getattr(host, "prune_every_k_steps", None) or None
        self.asked_density: float | None = None  # by the script, before sharing raised it

    @classmethod
    def recognises(cls, host_class: type) -> bool:
        """Whether hosts of this class are of the adapter's kind, told by the constructor."""
        return cls.parameters <= set(constructor_parameters(host_class))

    @staticmethod
    def own(given: dict[str, Any]) -> Any:
        """Our host in place of theirs, from all arguments of its constructor (`--east-host own`)."""
        raise UsageError("--east-host own: there is no host of east_plugins in place of this one")

    @classmethod
    def construct(cls, attachment: Attached, init: Callable[..., None], given: inspect.BoundArguments) -> None:
        """Run the host's constructor; a host that makes its masks there needs more than that."""
        init(*given.args, **given.kwargs)

    # ------------------------------------------------------------------ the host's books

    @property
    def optimizer(self) -> Optimizer:
        return self.host.optimizer

    @property
    def rate_decay(self) -> Any:
        """The object or function that decays the prune rate."""
        return self.host.prune_rate_decay

    @property
    def steps(self) -> int:
        return self.host.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.host.steps = value

    @property
    def model(self) -> nn.Module | None:
        """The network whose masks the host has made; None before it has."""
        return next(iter(self.host.modules), None)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        named = (item for module in self.host.modules for item in module.named_parameters())
        return {name: weight for name, weight in named if name in self.host.masks}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by parameter name; True is active. A copy: written back by `write`."""
        return {name: self.host.masks[name].bool().contiguous() for name in self.weights}

    @torch.no_grad()
    def write(self, masks: Mapping[str, Tensor]) -> None:
        """Give the host these masks; inactive weights and their momentum become zero."""
        for name, mask in masks.items():
            before = self.host.masks[name]
            self.host.masks[name] = mask.to(before.device, before.dtype)
        self.host.apply_mask()

    @property
    def frequency(self) -> int | None:
        """The host's own steps between updates; None where it has none or the script calls for them itself."""
        return self._frequency

    @property
    def density(self) -> float:
        """The target density, of the unshared network."""
        return self.host.density if self.asked_density is None else self.asked_density

    def gradient(self, name: str, weight: nn.Parameter) -> Tensor | None:
        """The dense gradient that the host's own update sees."""
        return weight.grad

    def last_update(self, total_steps: int) -> int:
        """The step from which on the host updates no more: cycles must have closed by then."""
        return total_steps

    def target_nonzeros(self, borrowed: int) -> int:
        """Active weights at the target density, those of dense layers included; `borrowed` weights count in the
        unshared network."""
        return round(self.density * (sum(mask.numel() for mask in self.masks.values()) + borrowed))

    def check_cycles(self) -> None:
        """Raise `UsageError` where a schedule of the host's own would fight with the cycles."""

    def begin(self, attachment: Attached) -> None:
        """Called once before the first training step, when schedule and activations are known."""

    def raise_density(self, arguments: dict[str, Any], factor: float) -> None:
        """Change the arguments of the host's `add_module` so that it makes masks of `factor` times the density asked
        for, at most dense, and note what was asked."""
        self.asked_density = arguments["density"]
        arguments["density"] = min(1.0, factor * arguments["density"])

    def updating(self, nonzeros: int) -> None:
        """Called before the host's own update inside cycles, with the active weights that they ask for."""

    # ------------------------------------------------------------------ the same for every host

    @property
    def nonzeros(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def note_fired(self) -> None:
        """Add what is active now to the fired weights."""
        for name, mask in self.masks.items():
            self.fired_masks[name] = mask | self.fired_masks[name] if name in self.fired_masks else mask

    def state_dict(self) -> dict[str, Any]:
        """Masks, fired weights, step and prune rate: what the scripts' own checkpoints lack."""
        self.note_fired()
        state = {} if self.rate_decay is None else vars(self.rate_decay)
        decay = {name: value for name, value in state.items() if isinstance(value, (int, float))}
        if stepper := getattr(self.rate_decay, "cosine_stepper", None):
            decay["cosine_stepper"] = stepper.state_dict()
        return {"masks": self.masks, "fired_masks": dict(self.fired_masks), "steps": self.steps, "decay": decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises `UsageError` where its layers are not this model's."""
        masks, own = state["masks"], self.masks
        if wrong := {
            n for n in masks.keys() | own.keys() if n not in masks or n not in own or masks[n].shape != own[n].shape
        }:
            raise UsageError(f"the saved masks do not fit the model; layers that differ: {', '.join(sorted(wrong))}")
        self.write(masks)
        self.fired_masks = {name: mask.to(own[name].device) for name, mask in state["fired_masks"].items()}
        self.steps = state["steps"]
        decay = dict(state["decay"])
        if stepper_state := decay.pop("cosine_stepper", None):
            stepper = self.rate_decay.cosine_stepper
            stepper.load_state_dict(copy.deepcopy(stepper_state))
            stepper.optimizer.param_groups[0]["lr"] = stepper.get_last_lr()[0]
        if decay:
            vars(self.rate_decay).update(decay)

    @torch.no_grad()
    def resize(self, budgets: Mapping[str, int], generator: torch.Generator, grow: bool = True) -> None:
        """Drop or (with `grow`) grow weights by the host's own rules, so that each layer has exactly its budget."""
        changed = {}
        for layer in self._layers(generator):
            count, wanted, flat = int(layer.mask.sum()), budgets[layer.name], layer.mask.view(-1)
            if count > wanted:
                score = _rule("pruning", self.pruning, "magnitude")(layer)
                flat[lowest_k(score, count - wanted, layer.mask, generator)] = False
            elif grow and count < wanted:
                score = _rule("growth", self.growth, "gradient")(layer)
                flat[top_k(score, wanted - count, ~layer.mask, generator)] = True
            else:
                continue
            changed[layer.name] = layer.mask
        if changed:
            self.write(changed)

    def _layers(self, generator: torch.Generator) -> Iterator[Layer]:
        masks = self.masks
        for name, weight in self.weights.items():
            state, gradient = self.optimizer.state.get(weight, {}), self.gradient(name, weight)
            none = torch.zeros_like(weight)  # a layer without gradient or momentum: every score ties
            yield Layer(
                name=name,
                weight=weight.detach(),
                mask=masks[name],
                fired=self.fired_masks.get(name, masks[name]),
                generator=generator,
                dense_grad=none if gradient is None else gradient,
                dense_momentum=next((state[k] for k in ("momentum_buffer", "exp_avg") if k in state), none),
            )


def _rule(kind: str, name: Any, fallback: str):
    """The registered rule of the host's mode; its functions of its own fall back to `fallback`."""
    rules = registry.BY_KIND[kind]
    known = isinstance(name, str) and name in rules.names()
    if known and "average" in rules.entry(name).meta.get("needs", ()):  # kept by our host only
        known = False
    return rules.bound(name if known else fallback)
