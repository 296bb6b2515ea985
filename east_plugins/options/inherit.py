"""Configuration files that inherit: `base: other.yaml` in a file takes up what the other one says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..plugins import registry
from . import flags

LONGEST = 20  #: files in a chain


def chain(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Path and content of a configuration file and of those that it inherits from, the most remote first.

    `base` is relative to the file that names it, and lies in the folder of the file at `path` or below it. Raises
    `UsageError` for others, for circles, for files that cannot be read, and for a `base` in a file that is read on
    nobody's word (`registry.names_of_a_file`): such a file names no other one.
    """
    if not str(path):
        raise UsageError("--config is empty: it must name a YAML file")
    found: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    folder, here = Path(path).resolve().parent, Path(path)
    while True:
        source = f"--config {here}"
        if here.resolve() in seen:
            circle = " -> ".join(str(file) for file, _ in [*reversed(found), (here, None)])
            raise UsageError(f"--config {path}: base leads back to where it began: {circle}")
        if len(seen) == LONGEST:
            raise UsageError(f"--config {path}: base leads over more than {LONGEST} files")
        seen.append(here.resolve())
        content = {str(key): value for key, value in flags.read_yaml(here, "--config").items()}
        others = [key for key in ("base", "config", "east-config", "east_config") if content.get(key) is not None]
        if others and registry.of_a_file():
            raise UsageError(f"{source}: {others[0]} names another file, which a run's own file does not")
        if "config" in content:
            raise UsageError(f"{source}: config cannot be a key of the file; allowed is base, a file to inherit from")
        base = content.pop("base", None)
        found.insert(0, (str(here), content))
        if base is None:
            return found
        if not isinstance(base, str) or not base:
            raise UsageError(f"{source}: base must be the path of a file, got {base!r}")
        here = here.parent / base
        if Path(base).is_absolute() or not here.resolve().is_relative_to(folder):
            raise UsageError(f"{source}: base {base} must be a file in {folder} or below it, named from this file on")
        if not here.is_file():
            raise UsageError(f"{source}: base {base} is no file; it is looked for as {here}")


@dataclass(frozen=True)
class Origins:
    """Which settings of a run stand in files: `lr_drops` to `lr-drops of configs/a.yaml`; and where schedules of a file
    were scaled, the epochs that they are counted for there."""

    keys: Mapping[str, str] = field(default_factory=dict)
    scaled_from: int | None = None

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """In the block, a `UsageError` that names a setting says the file and the key that it comes from."""
        try:
            yield
        except UsageError as error:
            error.args = (re.sub(r"`([a-z][a-z0-9_]*)`", lambda m: self.keys.get(m[1], m[0]), str(error)),)
            raise


def scaled(values: Mapping[str, Any], counted: set[str], ratio: float) -> dict[str, Any]:
    """`values`, those `counted` in epochs or steps times `ratio`; whole numbers stay whole, and at least 1."""

    def times(value: Any) -> Any:
        if isinstance(value, list):
            return [times(number) for number in value]
        return max(1, round(value * ratio)) if isinstance(value, int) else round(value * ratio, 9)

    return {name: times(value) if name in counted and value is not None else value for name, value in values.items()}
