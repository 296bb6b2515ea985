"""The few weights of S that are not zero, in a form to compute with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Live(NamedTuple):
    """The rows (outputs) and columns (input channel and tap) of a weight that hold all its nonzeros.

    Columns are in the order of D's, taps outermost.
    """

    rows: Tensor  # indices of output channels
    channels: Tensor  # the input channel of each column
    taps: list[int]  # number of columns at each tap of the kernel
    weight: Tensor  # rows x columns


def find(weight: Tensor, limit: float = 1.0) -> Live | None:
    """The live part of a weight (out, in, *kernel), at least one row and column; None where it has more live columns
    than the share `limit` of all, or obviously too many nonzeros."""
    weight = weight.detach()
    channels, taps = weight.shape[1], weight[0, 0].numel()
    columns = channels * taps
    # norms of blocks are the fastest first pass over the weight; only values under 1e-22 vanish in them
    blocks = weight.reshape(-1, math.gcd(weight.numel(), 64))
    found = torch.linalg.vector_norm(blocks, dim=1).nonzero()[:, 0]
    if limit < 1 and len(found) > columns:
        return None
    block, place = blocks[found].ne(0).nonzero().T
    position = found[block] * blocks.shape[1] + place
    if not len(position):
        position = position.new_zeros(1)  # one zero, so that nothing is empty
    row, column = position // columns, position % columns
    rows, row = row.unique(return_inverse=True)
    live, column = (column % taps * channels + column // taps).unique(return_inverse=True)
    if len(live) > limit * columns:
        return None
    values = weight.new_zeros(len(rows), len(live))
    values[row, column] = weight.reshape(-1)[position]
    return Live(rows, live % channels, torch.bincount(live // channels, minlength=taps).tolist(), values)
