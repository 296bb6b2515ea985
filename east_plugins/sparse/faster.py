"""Which passes are faster, sparse or dense: measured once on a machine, and the same from then on."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__

logger = logging.getLogger(__name__)


def store() -> Path:
    """The folder with this machine's times, a small file each: in `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "east_plugins" / "times"


class Times:
    """Seconds of a network's sparse and dense training passes, by size of the batch and number of active weights.

    What one process has measured, every later one on the machine takes: so runs of one command choose alike, and
    repeat bit for bit, though the clock does not. A checkpoint holds the times of its run, which go before.
    """

    def __init__(self, model: nn.Module):
        self._network = _hash((repr(model),))
        self._own: dict[str, float] = {}

    def keys(self, x: Tensor, nonzeros: int) -> tuple[str, str]:
        """What the time of a sparse pass over `x` goes by, and that of a dense one."""
        images = round(math.log2(len(x)))
        machine = (platform.node(), torch.get_num_threads(), torch.__version__, __version__)
        dense = (self._network, machine, x.device.type, images, tuple(x.shape[1:]), str(x.dtype))
        return _hash((*dense, round(2 * math.log2(max(1, nonzeros))))), _hash(dense)

    def sparse_is_slower(self, keys: Sequence[str]) -> bool:
        """Whether it is, by what is known in this process; False where nothing is."""
        sparse, dense = keys
        return self._own.get(sparse, 0.0) > self._own.get(dense, math.inf)

    def settle(self, keys: Sequence[str], measure: Sequence[Callable[[], float]]) -> None:
        """See to it that the times of both keys are known: from here, from the machine's files, or by measuring."""
        for key, seconds in zip(keys, measure, strict=True):
            if key not in self._own:
                self._own[key] = _read(key) or _keep(key, seconds())

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": list(self._own.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Times of older versions, which went by other keys, are measured anew."""
        self._own = {key: float(seconds) for key, seconds in state["seconds"] if isinstance(key, str)}


def _hash(key: tuple) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:24]


def _read(key: str) -> float | None:
    """The machine's time for a key; None where there is none that can be read."""
    try:
        return float((store() / key).read_text())
    except (OSError, ValueError):
        return None


def _keep(key: str, seconds: float) -> float:
    """Make a time the machine's, and return it; where another process was first, return its."""
    path = store() / key
    unfinished = path.with_name(f".{key}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(repr(seconds))
        try:
            os.link(unfinished, path)  # unlike a renaming it fails where the file is there
        finally:
            unfinished.unlink()
    except FileExistsError:
        return _read(key) or seconds
    except OSError as error:
        logger.info("the times of passes are not kept: %s", error)
    return seconds
