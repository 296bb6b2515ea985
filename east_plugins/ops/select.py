"""Exact selection: how a score becomes a set of positions of exactly the wanted size."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64

#: A selection under way: it yields what it must know from its device, gets that on the CPU, returns flat indices.
Selection = Generator[Tensor, Any, Tensor]


def top_k(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of the `k` highest scores among the `eligible` positions; shape [k], order unspecified.

    Exactly `k` for any scores: NaN counts as the lowest value, and equal scores at the boundary are chosen at
    random by `generator`, so that a layer without gradient explores instead of filling its first neurons. The
    choice depends on the scores' values and the generator only, not on the device. `scores` and `eligible` have
    one shape; the caller sees to it that at least `k` positions are eligible.
    """
    return together([highest(scores, k, eligible, generator)])[0]


def lowest_k(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of the `k` lowest scores among the few `eligible` positions; otherwise as `top_k`."""
    positions = eligible.reshape(-1).nonzero().flatten()
    return positions[together([lowest(scores.reshape(-1)[positions], k, generator)])[0]]


def top_k_of_rows(scores: Tensor, k: Tensor, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Boolean mask of the `k[i]` highest scores among the eligible places of every row i; as `top_k` otherwise.

    `scores` and `eligible` are [rows, columns], `k` is [rows]. A row with fewer eligible places gives all of them.
    """
    k = torch.minimum(k.to(scores.device), eligible.sum(1))
    most = int(k.max()) if len(k) else 0
    if most == 0:
        return torch.zeros_like(eligible)
    values = torch.where(eligible, scores, -torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    cut = values.topk(most, dim=1).values.gather(1, (k - 1).clamp(min=0)[:, None])
    above, tied = values > cut, (values == cut) & eligible & (k > 0)[:, None]
    short = k - above.sum(1)
    if torch.equal(tied.sum(1), short):  # nothing is left to choose
        return above | tied
    row, column = tied.nonzero(as_tuple=True)
    order = torch.randperm(len(row), generator=generator).to(row.device)
    order = order[row[order].argsort(stable=True)]  # by rows, in random order inside them
    row, column = row[order], column[order]
    first = torch.searchsorted(row, row)
    chosen = torch.arange(len(row), device=row.device) - first < short[row]
    above[row[chosen], column[chosen]] = True
    return above


def random_k(k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of `k` eligible positions, every subset equally likely."""
    return together([_random(k, eligible, generator)])[0]


def together(selections: Sequence[Selection]) -> list[Tensor]:
    """The results of several selections, run in step: each time, what all of them ask of the device comes in one
    transfer. Random numbers are drawn in the order of the selections, the same on every device."""
    waiting = dict(enumerate(selections))
    answers: dict[int, Tensor] = {}
    results: dict[int, Tensor] = {}
    while waiting:
        asked = {}
        for i, selection in list(waiting.items()):
            try:
                asked[i] = selection.send(answers.get(i))
            except StopIteration as end:
                results[i] = end.value
                del waiting[i]
        answers = dict(zip(asked, fetch(list(asked.values())), strict=True))
    return [results[i] for i in range(len(selections))]


def fetch(tensors: Sequence[Tensor], dtype: torch.dtype | None = torch.long) -> Sequence[Tensor]:
    """Tensors of one dimension on the CPU, by one transfer; all of one type, by default int64, None: their own."""
    if not tensors:
        return ()
    device, dtype = tensors[0].device, dtype or tensors[0].dtype
    return torch.cat([t.to(device, dtype) for t in tensors]).cpu().split([len(t) for t in tensors])


def upload(indices: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """CPU indices on a device, by one transfer for which the host does not wait."""
    if not indices or device.type == "cpu":
        return indices
    together = torch.cat(list(indices))
    together = together.pin_memory() if device.type == "cuda" else together
    return together.to(device, non_blocking=True).split([len(part) for part in indices])


def positions(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the `count` true entries of a mask, ascending; does not wait for the device."""
    flat = mask.reshape(-1)
    return places(flat) if _asks_nothing(flat) else torch.nonzero_static(flat, size=count).flatten()


def places(flat: Tensor) -> Tensor:
    """Flat indices of the true entries of a mask of one dimension, ascending. On the CPU eight entries are looked at at
    once, which for few of them takes a fraction of the time."""
    end = len(flat) // 8 * 8
    if flat.dtype != torch.bool or not flat.is_cpu or flat.storage_offset() % 8 or end < 4096:
        return flat.nonzero().flatten()
    words = flat[:end].view(torch.int64).nonzero() * 8
    found = torch.cat([(words + torch.arange(8)).flatten(), torch.arange(end, len(flat))])
    return found[flat[found]]


def highest(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Selection:
    """`top_k` for `together`."""
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    if not any(scores.stride()):  # one value expanded over the layer: every position ties with every other
        return (yield from _random(k, eligible, generator))
    scores, candidates, among = scores.reshape(-1), None, eligible.reshape(-1)
    if _asks_nothing(scores):  # an accelerator goes over all of them faster than the host knows how many are needed
        candidates = _candidates(scores, k, among)
        scores, among = scores[candidates], among[candidates]
    scores = torch.where(among, scores, -torch.inf).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    values, best = scores.topk(k, sorted=False)
    cut = values.min()
    above, tied = values > cut, (scores == cut) & among
    counts = yield torch.stack([above.sum(), tied.sum(), among[best].sum()])
    more, ties, eligible_ones = counts.tolist()
    if ties == k - more and eligible_ones == k:  # nothing is left to choose
        chosen = best
    else:
        drawn = choose(ties, k - more, generator)
        chosen = torch.cat([best[positions(above, more)], positions(tied, ties)[upload([drawn], tied.device)[0]]])
    return chosen if candidates is None else candidates[chosen]


def lowest(values: Tensor, k: int, generator: torch.Generator) -> Selection:
    """Indices of the `k` lowest of few values, for `together`."""
    return highest(values.neg(), k, torch.ones_like(values, dtype=torch.bool), generator)


def _random(k: int, eligible: Tensor, generator: torch.Generator) -> Selection:
    flat = eligible.reshape(-1)
    if flat.numel() > 16 * k:  # few are wanted: draw positions and keep the eligible ones, if that is enough
        yield flat[:0]  # draws come after the same number of turns for layers of every size
        drawn = choose(flat.numel(), min(2 * k + 16, flat.numel()), generator)
        usable = yield flat[upload([drawn], flat.device)[0]]
        drawn = drawn[usable.bool()]
        if len(drawn) >= k:
            return upload([drawn[:k]], flat.device)[0]
    (count,) = (yield flat.sum().view(1)).tolist()
    return positions(flat, count)[upload([choose(count, k, generator)], flat.device)[0]]


def choose(n: int, k: int, generator: torch.Generator) -> Tensor:
    """`k` distinct integers of range(n) in random order, on the CPU; every subset equally likely."""
    if k == n:
        return torch.arange(n)
    if 4 * k > n:
        return torch.randperm(n, generator=generator)[:k]
    drawn = torch.empty(0, dtype=torch.long)
    while len(drawn) < k:
        more = torch.randint(n, (k + k // 2 + 8,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:k]]


def _asks_nothing(tensor: Tensor) -> bool:
    """Whether sizes are found as they come: on the CPU, and where PyTorch has no `nonzero_static` for sure."""
    return not tensor.is_cuda


def _candidates(scores: Tensor, k: int, eligible: Tensor) -> Tensor:
    """Eligible positions that can be among the k highest, ascending, found in one pass over the scores.

    The k-th largest of the maxima of disjoint blocks is at most the k-th largest score, so nothing below it is
    needed. With k small against the layer this leaves a few times k positions to select from.
    """
    blocks = scores.numel() // _BLOCK
    end = blocks * _BLOCK
    # the maxima of blocks that are not whole may be of scores that do not count
    whole = _whole(eligible[:end])
    maxima = scores[:end].view(blocks, _BLOCK).amax(1)
    if blocks <= k or maxima.isnan().any():
        return eligible.nonzero().flatten()
    bound = torch.where(whole, maxima, -torch.inf).topk(k, sorted=False).values.min()
    high = ((maxima >= bound) | ~whole).nonzero()
    if len(high) > blocks // 4:  # many ties, as in a layer without gradient
        return places((scores >= bound) & eligible)
    found = torch.cat([(high * _BLOCK + torch.arange(_BLOCK)).flatten(), torch.arange(end, len(scores))])
    return found[eligible[found]]


def _whole(eligible: Tensor) -> Tensor:
    """Whether all of a block's entries are true. Sums of eight entries at once take a twentieth of the time."""
    if eligible.storage_offset() % 8 or eligible.dtype != torch.bool:
        return eligible.view(-1, _BLOCK).all(1)
    return eligible.view(torch.int64).view(-1, _BLOCK // 8).sum(1) == _BLOCK // 8 * 0x0101010101010101
