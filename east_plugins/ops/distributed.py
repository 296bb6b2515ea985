"""Agreement between processes. All functions do nothing in a single-process run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean(tensor: Tensor) -> Tensor:
    """The tensor averaged over all ranks, as a new tensor (growth wants |mean g|, not the mean of |g|)."""
    if not active():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def from_rank_0(value):
    """Rank 0's picklable `value` on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
