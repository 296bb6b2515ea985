"""GraNet's `Masking` (VITA-Group/GraNet, `CIFAR/sparselearning/core.py`, and `ImageNet/core.py` beside it)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ...errors import UsageError
from ...host.masking import Masking
from ...plugins.density import Gradual
from ..adapter import Adapter
from .family import DrivenMasking, own_decay


class GraNet(Adapter):
    """Updates inside `step`; `--prune` and `--growth` are ignored, magnitude and gradient it is."""

    title = "GraNet"
    parameters = frozenset({"optimizer", "prune_rate", "prune_rate_decay", "train_loader", "args"})
    driven = DrivenMasking

    def __init__(self, host: Any):
        super().__init__(host)
        self.asked_density = host.args.init_density  # what --method DST stays at; the others have no cycles

    def check_cycles(self) -> None:
        if self.host.args.method != "DST":
            raise UsageError(
                f"`east_cyclic` needs GraNet's --method DST: with --method {self.host.args.method} its own gradual "
                "pruning sets the density"
            )

    def raise_density(self, arguments: dict[str, Any], factor: float) -> None:
        self.host.args = copy.copy(self.host.args)  # theirs is the script's own namespace
        for name in ("init_density", "final_density"):
            setattr(self.host.args, name, min(1.0, factor * getattr(self.host.args, name)))

    @staticmethod
    def own(given: dict[str, Any]) -> Masking:
        return _OwnHost(given)


class _OwnHost(Masking):
    """Our host with GraNet's namespace for its flags."""

    def __init__(self, given: dict[str, Any]):
        args = given["args"]
        schedule, gradual = None, args.method != "DST"
        if gradual:
            steps = len(given["train_loader"]) * args.multiplier
            schedule = Gradual(
                args.final_density,
                initial=1.0 if "GMP" in args.method else args.init_density,
                start=args.init_prune_epoch * steps,
                stop=args.final_prune_epoch * steps,
                frequency=args.update_frequency,
                end=args.epochs * steps,
            )
        self._density = args.final_density if gradual else args.init_density
        prunes_only, rate = "GMP" in args.method, given["prune_rate"]
        super().__init__(
            given["optimizer"],
            death_rate=0.0 if prunes_only else rate,
            death_rate_decay=None if prunes_only else own_decay(given["prune_rate_decay"], rate),
            death_mode="magnitude",
            growth_mode="gradient",
            args=args,
            schedule=schedule,
            prune_scope="global" if gradual and "uniform" not in args.method else "local",
        )

    def add_module(self, module: nn.Module, sparse_init: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        super().add_module(module, self._density, self.args.sparse_init, **kwargs)
