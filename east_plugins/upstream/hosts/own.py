"""Our own `Masking`, seen through the same interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import UsageError
from ...host.masking import Masking
from ...plugins.density import Constant
from ..adapter import Adapter, Attached, Driven, constructor_parameters, theirs


class _Driven(Driven):
    def add_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        with self.east.making_masks(module):  # it counts the unshared network by itself
            theirs(super()).add_module(module, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = theirs(super()).step(*args, **kwargs)
        self.east.stepped()
        return result


class Own(Adapter):
    """Takes the cycles as its schedule and needs no resizing."""

    title = "east_plugins"
    parameters = frozenset(constructor_parameters(Masking))
    driven = _Driven

    @classmethod
    def recognises(cls, host_class: type) -> bool:
        return issubclass(host_class, Masking)

    @property
    def rate_decay(self) -> Any:
        return self.host.death_rate_decay

    @property
    def frequency(self) -> int | None:
        return self.host.schedule.frequency

    def last_update(self, total_steps: int) -> int:
        return int(min(total_steps, self.host.schedule.end))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.host.weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: mask.clone() for name, mask in self.host.masks.items()}

    def check_cycles(self) -> None:
        if not isinstance(self.host.schedule, Constant):
            raise UsageError("`east_cyclic` needs a host of constant density; this one has a schedule of its own")

    def begin(self, attachment: Attached) -> None:
        if attachment.cycle is not None:
            self.host.schedule = attachment.cycle

    def state_dict(self) -> dict[str, Any]:
        return self.host.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.host.load_state_dict(state)
