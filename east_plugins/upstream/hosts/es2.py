"""The `Masking` of EAST's authors (TensorStrike/ES2, `sparselearning/core.py`): ITOP's, with cycles of its own.

Its networks have DyReLU and shared weights built in, which its masks leave out by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import UsageError
from ...host.masking import Masking
from ...ops.maskable import unwrap
from ...plugins.density import Cyclic
from ..adapter import theirs
from .family import DrivenMasking, own_decay
from .itop import ITOP

#: Steps between updates once its cycles are over: a constant in its code.
AFTER_CYCLES = 4000


class _Driven(DrivenMasking):
    def prune_regrow(self) -> None:
        """An update inside its own cycles."""
        with self.east.resizing():
            theirs(super()).prune_regrow()


class ES2(ITOP):
    """Updates as ITOP's; with the script's `--cyclic` its cycles only grow or only prune."""

    title = "ES2"
    driven = _Driven

    @classmethod
    def recognises(cls, host_class: type) -> bool:
        return super().recognises(host_class) and hasattr(host_class, "get_metrics")

    def check_cycles(self) -> None:
        if _cyclic(self.host.args):
            raise UsageError("`east_cyclic`: the script's own --cyclic makes cycles already; use one of the two")

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        return _OwnHost(**given)


class _OwnHost(Masking):
    """Our host with ES2's cycles and report: the counts are exact, and cycles close at the target."""

    def __init__(self, optimizer: Any, death_rate: float = 0.3, **given: Any):
        super().__init__(optimizer, death_rate, **given)
        self.steps_per_cycle: list[float] = []  # set by the script before `add_module`
        self.cyclic_end_step = 0.0

    def add_module(self, module: nn.Module, density: float = 0.05, sparse_init: str = "ERK", **kwargs: Any) -> None:
        model = unwrap(module)
        dyrelu = [name for name, _ in model.named_parameters() if "relu" in name.lower()]  # as its own masks leave out
        if _cyclic(self.args) and self.prune_every_k_steps and self.steps_per_cycle:
            self.schedule = self._cycles(density)
            close, decay = self.schedule.close, own_decay(self.death_rate_decay, self.death_rate)
            self.death_rate_decay = lambda step: 0.0 if step <= close else decay(step)  # cycles replace nothing
        super().add_module(module, density, sparse_init, exclude=dyrelu, **kwargs)

    def _cycles(self, density: float) -> Cyclic:
        args, lengths = self.args, self.steps_per_cycle
        return Cyclic(
            density,
            multiplier=args.density_max_multiplier,
            cycles=len(lengths),
            length=round(lengths[0]),
            length_mult=lengths[1] / lengths[0] if len(lengths) > 1 else 1.0,
            pattern=args.cyclic_pattern,
            cyclic_frequency=self.prune_every_k_steps or 1,
            frequency=AFTER_CYCLES,
        )

    def get_metrics(self) -> dict[str, float]:
        """Counts and densities by the names of ES2's report; shared weights count once for every block."""
        model = unwrap(self.modules[0])
        ratio = getattr(self.args, "ratio", 0)
        own, active = sum(mask.numel() for mask in self.masks.values()), self.nonzeros
        shared = active_shared = 0
        for stage, blocks in model.named_children():
            if isinstance(blocks, nn.ModuleList) and 0 < ratio < len(blocks):
                lent = [name for name in self.masks if name.startswith(f"{stage}.{ratio - 1}.")]
                shared += (len(blocks) - ratio) * sum(self.masks[name].numel() for name in lent)
                active_shared += (len(blocks) - ratio) * sum(self.name2nonzeros[name] for name in lent)
        return {
            "overall_density": (active + active_shared) / (own + shared),
            "normalized_density": active / (own + shared),
            "total_params": own + shared,
            "active_params": active + active_shared,
            "normal_params": own,
            "active_normal_params": active,
        }


def _cyclic(args: Any) -> bool:
    return bool(getattr(args, "cyclic", False))
