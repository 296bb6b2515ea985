"""What the commands `cycles` and `study` train: stages at which densities, and which lists of values by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .flags import option

#: A study's lists, where neither flags nor a file's grid say (Nowak et al. 2023, Section 5.1).
STUDY: dict[str, list[Any]] = dict(
    criteria=["magnitude", "SET", "MEST", "rsensitivity", "SNIP", "random", "static"], growths=["random", "gradient"],
    densities=[0.05, 0.1, 0.2], periods=[800], seeds=[0, 1, 2, 3, 4],
)  # fmt: skip

PROGRAMS = {
    "cyclic": "cycles of one mask at the density",
    "sculpt": "cycles at the first density, one magnitude pruning to the density, one more cycle",
    "imp": "train and prune in turn, weights rewound to the start",
    "wr": "train and prune in turn, weights rewound to an epoch of the first stage",
    "lrr": "train and prune in turn, weights kept",
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the stages are. Raises `UsageError` for numbers that cannot be, or that the program has no use for."""

    program: str = option(
        "cyclic", "; ".join(f"{name}: {help}" for name, help in PROGRAMS.items()), choices=[*PROGRAMS]
    )
    cycles: int | None = option(None, "cyclic, sculpt: cycles before the pruning (default: 3)", type=int)
    first_density: float | None = option(
        None, "density of the first stage (default: sculpt: five times the density; imp, wr, lrr: 1)", type=float
    )
    prune: float | None = option(None, "imp, wr, lrr: share that is pruned after a stage (default: 0.2)", type=float)
    rewind: int | None = option(None, "wr: epoch of the first stage that weights are rewound to (default: 1)", type=int)

    def __post_init__(self) -> None:
        if self.program not in PROGRAMS:
            raise UsageError(f"`program` must be one of {', '.join(PROGRAMS)}, got {self.program!r}")
        used = {"cycles": ("cyclic", "sculpt"), "first_density": ("sculpt", "imp", "wr", "lrr"),
                "prune": ("imp", "wr", "lrr"), "rewind": ("wr",)}  # fmt: skip
        for name, programs in used.items():
            if getattr(self, name) is not None and self.program not in programs:
                raise UsageError(f"`{name}` is of `program` {', '.join(programs)}, not of {self.program}")
        if self.cycles is not None and not 1 <= self.cycles <= 1000:
            raise UsageError(f"`cycles` must be from 1 to 1000, got {self.cycles}")
        if self.first_density is not None and not 0 < self.first_density <= 1:
            raise UsageError(f"`first_density` must be over 0 and at most 1, got {self.first_density}")
        if self.prune is not None and not 0.001 <= self.prune < 1:
            raise UsageError(f"`prune` must be from 0.001 on and below 1, got {self.prune}")

    def densities(self, density: float) -> list[float]:
        """The density of every stage; the last one is `density` itself."""
        cycles = self.cycles or 3
        if self.program == "cyclic":
            return [density] * cycles
        first = self.first_density
        if first is None:
            first = min(1.0, 5 * density) if self.program == "sculpt" else 1.0
        if first < density:
            raise UsageError(f"`first_density` {first:g} is smaller than `density` {density:g}")
        if self.program == "sculpt":
            return [first] * cycles + [density]
        found, kept = [first], 1 - (0.2 if self.prune is None else self.prune)
        while found[-1] * kept > density * (1 + 1e-9):
            found.append(found[-1] * kept)
        return [*found, density] if found[-1] > density else found
