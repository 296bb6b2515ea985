"""The rest of ITOP's call surface, so that a script changes one import and runs: its decays and its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from ..plugins.rate import Cosine, Stepped


class CosineDecay:
    """ITOP's cosine decay of the prune rate: `step()` once a step, `get_dr()` gives the rate.

    Unlike ITOP's it stays at `eta_min` past `T_max` (theirs rises again). `last_epoch` as in ITOP: -1 starts anew.
    """

    def __init__(self, death_rate: float, T_max: int, eta_min: float = 0.005, last_epoch: int = -1):
        self._rate: Callable[[int], float] = Cosine(death_rate, T_max, eta_min)
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
            raise UsageError(
                "LinearDecay needs a rate in [0, 1], a factor in (0, 1] and a frequency of at least 1, got "
                f"{death_rate}, {factor} and {frequency}"
            )
        self._rate = Stepped(death_rate, 1, factor, frequency)
        self.steps = 0


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
