"""One interface to the masks of every host, and the exact resizing of somebody else's masks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.select import lowest_k, top_k
from ..ops.swap import Swapped
from ..plugins import registry
from ..plugins.protocols import Layer

if TYPE_CHECKING:
    from .attachment import Attachment


class Driven(Swapped):
    """Mixed into the class of a host: its own methods, with EAST's moves before and after them."""

    east: Attachment


class Adapter:
    """A host's masks, fired weights and step, whichever host it is: read, written and saved in one way.

    This base reads hosts that keep float masks by parameter name (`masks`, `modules`, `steps`, `apply_mask`), as
    the three of the sparse_learning family do. Upstream hosts replace their mask tensors at every update, so none
    is ever kept: `masks` is read anew.

    """

    title = ""
    #: Constructor parameters that tell this host from the others.
    parameters: frozenset[str] = frozenset()
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
    def construct(cls, attachment: Attachment, init: Callable[..., None], given: inspect.BoundArguments) -> None:
        """Run the host's constructor; a host that makes its masks there needs more than that."""
        init(*given.args, **given.kwargs)

    # ------------------------------------------------------------------ the host's books

    @property
    def optimizer(self) -> torch.optim.Optimizer:
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

    def begin(self, attachment: Attachment) -> None:
        """Called once before the first training step, when schedule and activations are known."""

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
    return rules.get(name if isinstance(name, str) and name in rules.names() else fallback)
