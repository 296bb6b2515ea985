"""The rest of ITOP's call surface, so that a script changes one import and runs: decays, flags, names."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..ops.maskable import unwrap
from ..ops.select import fetch
from ..plugins.rate import Cosine

logger = logging.getLogger(__name__)


class CosineDecay:
    """ITOP's cosine decay of the prune rate: `step()` once a step, `get_dr()` gives the rate.

    Unlike ITOP's it stays at `eta_min` past `T_max` (theirs rises again). `last_epoch` as in ITOP: -1 starts anew.
    """

    def __init__(self, death_rate: float, T_max: int, eta_min: float = 0.005, last_epoch: int = -1):
        self._rate = Cosine(death_rate, T_max, eta_min)
        self.steps = max(0, last_epoch)

    def step(self) -> None:
        self.steps += 1

    def get_dr(self, death_rate: float | None = None) -> float:
        """The rate at this step; `death_rate` (sparse_learning's argument) is not needed."""
        return self._rate(self.steps)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class LinearDecay(CosineDecay):
    """ITOP's stepwise decay: the rate times `factor` after every `frequency` steps.

    ITOP calls its `get_dr` with the wrong arity; this one takes none or one argument.
    """

    def __init__(self, death_rate: float, factor: float = 0.99, frequency: int = 600):
        if not (0 <= death_rate <= 1 and 0 < factor <= 1 and frequency >= 1):
            raise UsageError(f"LinearDecay needs rate and factor in [0, 1], got {death_rate} and {factor}")
        self._rate = lambda step: death_rate * math.pow(factor, step // frequency)
        self.steps = 0


class Surface:
    """What ITOP's and sparse_learning's scripts and rules call on a masking besides our host's own methods."""

    def remove_weight_partial_name(self, partial_name: str) -> None:
        """Stop masking every weight whose name contains `partial_name`."""
        for name in [name for name in self.masks if partial_name in name]:
            self.remove_weight(name)

    def remove_type(self, nn_type: type[nn.Module]) -> None:
        """Stop masking the weights of every module of class `nn_type`."""
        for name, module in unwrap(self.modules[0]).named_modules():
            if isinstance(module, nn_type) and f"{name}.weight" in self.masks:
                self.remove_weight(f"{name}.weight")

    def fired_masks_update(self) -> tuple[dict[str, float], float]:
        """Share of weights active at least once so far: per layer, and of all maskable ones of the unshared network, as
        the density counts them (the ITOP rate)."""
        for name in self.masks:
            mask = self._mask(name)  # first: brings both to the weight's device
            self.fired_masks[name] |= mask
        counts = fetch([mask.sum().view(1) for mask in self.fired_masks.values()])
        fired = {name: int(count) for name, count in zip(self.fired_masks, counts, strict=True)}
        shares = {name: count / self.masks[name].numel() for name, count in fired.items()}
        return shares, sum(fired.values()) / self.theoretical_size

    def print_nonzero_counts(self) -> None:
        """Log every layer's active weights (level INFO of this module's logger)."""
        for name, count in self.name2nonzeros.items():
            logger.info("%s: %d active, density %.6f", name, count, count / self.masks[name].numel())

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        return self._momentum[self._name_of(weight)]

    def get_gradient_for_weights(self, weight: Tensor) -> Tensor:
        return self._layer(self._name_of(weight)).grad.clone()

    @property
    def names(self) -> list[str]:
        return list(self.masks)

    @property
    def name2zeros(self) -> dict[str, int]:
        return {name: mask.numel() - self.name2nonzeros[name] for name, mask in self.masks.items()}

    @property
    def prune_rate(self) -> float:
        return self.death_rate

    @property
    def name2prune_rate(self) -> dict[str, float]:
        return dict.fromkeys(self.masks, self.death_rate)

    def _name_of(self, weight: Tensor) -> str:
        return next(name for name, ours in self.weights.items() if ours is weight)


def add_sparse_args(parser: Any) -> None:
    """Add ITOP's sparse flags to an `argparse` parser, with its spellings (and `-` for `_`) and our rules."""
    add = parser.add_argument
    add("--sparse", action="store_true", help="train sparse (default: dense)")
    add("--fix", action="store_true", help="keep the topology fixed (default: update it)")
    add("--sparse_init", "--sparse-init", default="ERK", help="allocation (default: ERK; see `plugins`)")
    add("--growth", default="random", help="growth rule (default: random; see `plugins`)")
    add("--death", default="magnitude", help="prune rule (default: magnitude; see `plugins`)")
    add("--redistribution", default="none", help="none, magnitude, nonzeros or momentum (default: none)")
    add("--death-rate", type=float, default=0.5, help="share of active weights replaced in an update (default: 0.5)")
    add("--density", type=float, default=0.05, help="active share of the maskable weights (default: 0.05)")
    add(
        "--update_frequency",
        "--update-frequency",
        type=int,
        default=100,
        metavar="N",
        help="steps between topology updates (default: 100)",
    )
    add("--decay-schedule", default="cosine", help="decay of the death rate: cosine or linear (default: cosine)")
