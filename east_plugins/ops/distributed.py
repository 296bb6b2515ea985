"""Agreement between processes. All functions do nothing in a single-process run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RanksError

_ODD = -7046029254386353131, -4417276706812531889  # 2^64 over the golden ratio, and a second constant to mix with


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """A process that died is one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise RanksError(f"another process of this run is gone, and this one ends: {reason}") from error


def mean(tensor: Tensor) -> Tensor:
    """The tensor averaged over all ranks, as a new tensor (growth wants |mean g|, not the mean of |g|)."""
    if not active():
        return tensor
    total = tensor.clone()
    with _all_there():
        dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def from_rank_0(value):
    """Rank 0's picklable `value` on every rank."""
    if not active():
        return value
    box = [value]
    with _all_there():
        dist.broadcast_object_list(box)
    return box[0]


def check_alike(positions: Mapping[str, Tensor]) -> None:
    """Raises `RanksError`, naming the first layer, where the active positions (int64, by layer) are not the same on all
    ranks. A digest of each is compared, all in one exchange of 16 bytes a layer."""
    if not active() or not positions:
        return
    digests = torch.stack([_digest(each) for each in positions.values()])
    extremes = torch.cat([digests, -digests])
    with _all_there():
        dist.all_reduce(extremes, dist.ReduceOp.MIN)
    smallest, largest = extremes.chunk(2)
    for name, same in zip(positions, (smallest == -largest).tolist(), strict=True):
        if not same:
            raise RanksError(
                f"the masks of {name} differ between the processes of this run: make the host after "
                "torch.distributed.init_process_group, and begin with the same weights and state on every rank"
            )


def _digest(positions: Tensor) -> Tensor:
    """A number that another set of positions is unlikely to have: the sum of a hash of each, modulo 2^62."""
    mixed = (positions + 1) * _ODD[0]
    mixed = (mixed ^ (mixed >> 29)) * _ODD[1]
    return (mixed ^ (mixed >> 32)).sum() & (2**62 - 1)
