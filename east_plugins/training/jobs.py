"""The runs of a comparison: methods, sparsities and seeds, and whatever else a grid file varies."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import grid, sources
from ..options import methods as presets
from ..options.config import Config

METHODS, SPARSITIES, SEEDS = ("set", "rigl", "east"), (0.999, 0.9995), (0,)  #: where neither flags nor a file say
LONGEST_NAME = 200  #: of a run's folder
_APART = ("method", "sparsity", "seed")


@dataclass(frozen=True)
class Job:
    """One run of a comparison; `varied` are the settings beside method, sparsity and seed in which its runs differ."""

    method: str
    sparsity: float
    seed: int
    options: Config
    out: Path
    varied: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method, and what is varied beside it."""
        return label(self.method, self.varied)


def label(method: str, varied: Mapping[str, str]) -> str:
    """A method and settings as one name, such as `rigl+cyclic model=resnet34`."""
    return " ".join([method, *(f"{shown(name)}={value}" for name, value in varied.items())])


def shown(name: str) -> str:
    """A setting's name in tables and names of folders."""
    return name.removeprefix("east_").replace("_", "-")


def is_dense(method: str) -> bool:
    """Whether the method has all weights active, tricks or not, so that it has one row at every sparsity."""
    return method.split("+")[0] == "dense"


def jobs(
    methods: Sequence[str] | None,
    sparsities: Sequence[float] | None,
    seeds: Sequence[int] | None,
    out: Path,
    settings: Mapping[str, Any],
) -> list[Job]:
    """All runs of a comparison, every one checked; raises `UsageError` before any has started.

    `settings` are flags of `train` by name, those of a `config` file among them. What is None, and what else varies, is
    as the file's `grid` says; what is given goes before it.
    """
    for name in ("density", "method", "seed"):
        if name in settings:
            raise UsageError(f"`{name}` cannot be given to compare; it has `methods`, `sparsities` and `seeds`")
    settings = dict(settings)
    config = settings.pop("config", None)
    file = None if config is None else sources.read(config)
    given: dict[str, Sequence[Any] | None] = {"method": methods, "sparsity": sparsities, "seed": seeds}
    _check(given)
    found: list[Job] = []
    names = grid.varied(file.blocks, _APART) if file else []
    said = {name for name, some in given.items() if some is not None} | settings.keys()
    narrowed = file is not None and any(name in said for block in file.blocks for name in block)  # blocks may coincide
    for block in (file.blocks if file else ()) or [{}]:
        block = {**block, **{name: [settings[name]] for name in block if name in settings}}
        lists = {name: _values(name, given[name], block, file if file and file.blocks else None) for name in _APART}
        for others in grid.combinations(block, _APART):
            of_grid = {name: value for name, value in others.items() if name not in settings}
            base = {} if file is None else {"config": dataclasses.replace(file, blocks=()).at(of_grid)}
            varied = {name: _plain(others[name]) for name in names if name in others}
            for apart in _products(**lists):
                job = _job(apart, varied, out, {**base, **settings})
                if not narrowed or all(job.options != other.options for other in found):
                    found.append(job)
    found = _by_one_recipe(found)
    places = [job.out for job in found]
    if twice := [place for i, place in enumerate(places) if place in places[:i]]:
        raise UsageError(f"`config` {config}: its grid has {twice[0].name} twice")
    return found


def _by_one_recipe(found: list[Job]) -> list[Job]:
    """The jobs, trained alike: where EAST is among those that ask for no recipe, its default is that of all of them."""
    if "east" not in {presets.default_recipe(job.method) for job in found if job.options.recipe is None}:
        return found
    return [
        dataclasses.replace(job, options=dataclasses.replace(job.options, recipe=job.options.recipe or "east"))
        for job in found
    ]


def _check(given: Mapping[str, Sequence[Any] | None]) -> None:
    for sparsity in given["sparsity"] or ():
        if not 0 <= sparsity < 1:
            raise UsageError(f"`sparsities` must be in [0, 1), got {sparsity:g}")
    plural = {"method": "methods", "sparsity": "sparsities", "seed": "seeds"}
    for name, some in given.items():
        values = [f"{value:g}" for value in some or ()] if name == "sparsity" else list(some or ())
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UsageError(f"`{plural[name]}` must differ, got {twice[0]} twice")


def _values(name: str, given: Sequence[Any] | None, block: grid.Block, file: sources.File | None) -> Sequence[Any]:
    """The methods, sparsities or seeds of a block: given, of the block, of the grid's file, or the defaults."""
    if given is not None:
        return given
    if name in block:
        try:
            return [{"method": str, "sparsity": float, "seed": int}[name](value) for value in block[name]]
        except (TypeError, ValueError):
            raise UsageError(f"`config` {file and file.path}: {name} of grid cannot be {block[name]}") from None
    known = file.values if file else {}
    if name == "sparsity" and "density" in known:
        return [round(1 - known["density"], 12)]
    if name in known:
        return [known[name]]
    return {"method": METHODS, "sparsity": SPARSITIES, "seed": SEEDS}[name]


def _products(method: Sequence[str], sparsity: Sequence[float], seed: Sequence[int]) -> list[tuple[str, float, int]]:
    return [(m, s, n) for m in method for s in ([0.0] if is_dense(m) else sparsity) for n in seed]


def _job(apart: tuple[str, float, int], varied: Mapping[str, str], out: Path, settings: Mapping[str, Any]) -> Job:
    method, sparsity, seed = apart
    if not 0 <= sparsity < 1:
        raise UsageError(f"`config`: sparsity of its grid must be in [0, 1), got {sparsity:g}")
    options = sources.from_flags({**settings, "method": method, "density": round(1 - sparsity, 12), "seed": seed})
    words = [method, f"{sparsity:g}", *(f"{shown(name)}={value}" for name, value in varied.items()), f"seed{seed}"]
    return Job(method, sparsity, seed, options, out / _folder("-".join(words)), varied)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folder(name: str) -> str:
    """A name as a folder's: without what file systems do not take, and no longer than they do."""
    name = re.sub(r"[^\w+=.,-]", "_", name)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
