"""Exact selection: how a score becomes a set of positions of exactly the wanted size."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

_BLOCK = 1024

#: A selection under way: it yields what it must know from its device, gets that on the CPU, returns flat indices.
Selection = Generator[Tensor, Tensor, Tensor]


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


def random_k(k: int, eligible: Tensor, generator: torch.Generator) -> Tensor:
    """Flat indices of `k` eligible positions, every subset equally likely."""
    return together([_random(k, eligible, generator)])[0]


def together(selections: Sequence[Selection]) -> list[Tensor]:
    """The results of several selections, run in step: each time, what all of them ask of the device comes in one
    transfer. Random numbers are drawn in the order of the selections, the same on every device."""
    waiting, answers, results = dict(enumerate(selections)), {}, {}
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


def fetch(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Integer or boolean tensors of one dimension on the CPU, by one transfer; all int64."""
    if not tensors:
        return ()
    device = tensors[0].device
    return torch.cat([t.to(device, torch.long) for t in tensors]).cpu().split([len(t) for t in tensors])


def positions(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the `count` true entries of a mask, ascending; does not wait for the device."""
    flat = mask.reshape(-1)
    return flat.nonzero().flatten() if _asks_nothing(flat) else torch.nonzero_static(flat, size=count).flatten()


def highest(scores: Tensor, k: int, eligible: Tensor, generator: torch.Generator) -> Selection:
    """`top_k` for `together`."""
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=scores.device)
    if not any(scores.stride()):  # one value expanded over the layer: every position ties with every other
        return (yield from _random(k, eligible, generator))
    scores = torch.where(eligible, scores, -torch.inf).reshape(-1).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    candidates, among = None, eligible.reshape(-1)
    if _asks_nothing(scores):  # an accelerator goes over all of them faster than the host knows how many are needed
        candidates = _at_least_kth_block_maximum(scores, k, among)
        scores, among = scores[candidates], among[candidates]
    cut = scores.topk(k, sorted=False).values.min()
    above, tied = yield from _found(scores > cut, (scores == cut) & among)
    chosen = torch.cat([above, tied[_upload(choose(len(tied), k - len(above), generator), tied.device)]])
    return chosen if candidates is None else candidates[chosen]


def lowest(values: Tensor, k: int, generator: torch.Generator) -> Selection:
    """Indices of the `k` lowest of few values, for `together`."""
    return highest(values.neg(), k, torch.ones_like(values, dtype=torch.bool), generator)


def _random(k: int, eligible: Tensor, generator: torch.Generator) -> Selection:
    flat = eligible.reshape(-1)
    if flat.numel() > 16 * k:  # few are wanted: draw positions and keep the eligible ones, if that is enough
        yield flat[:0]  # draws come after the same number of turns for layers of every size
        drawn = choose(flat.numel(), min(2 * k + 16, flat.numel()), generator)
        usable = yield flat[_upload(drawn, flat.device)]
        drawn = drawn[usable.bool()]
        if len(drawn) >= k:
            return _upload(drawn[:k], flat.device)
    (found,) = yield from _found(flat)
    return found[_upload(choose(len(found), k, generator), flat.device)]


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


def _found(*masks: Tensor) -> Generator[Tensor, Tensor, list[Tensor]]:
    """Positions of the true entries of masks; their numbers are asked of the device together."""
    if _asks_nothing(masks[0]):
        yield masks[0][:0]  # nothing to ask, but the same turns as on other devices
        return [mask.nonzero().flatten() for mask in masks]
    counts = yield torch.stack([mask.sum() for mask in masks])
    return [positions(mask, count) for mask, count in zip(masks, counts.tolist(), strict=True)]


def _upload(indices: Tensor, device: torch.device) -> Tensor:
    """CPU indices on the device; the host does not wait for the copy."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def _asks_nothing(tensor: Tensor) -> bool:
    """Whether sizes are found as they come: on the CPU, and where PyTorch has no `nonzero_static` for sure."""
    return not tensor.is_cuda


def _at_least_kth_block_maximum(scores: Tensor, k: int, eligible: Tensor) -> Tensor:
    """Positions that can be among the k highest, found in one pass.

    The k-th largest of the maxima of disjoint blocks is at most the k-th largest score, so nothing below it is
    needed. With k small against the layer this leaves a few times k positions to select from.
    """
    blocks = scores.numel() // _BLOCK
    if blocks <= k:
        return eligible.nonzero().flatten()
    maxima = scores[: blocks * _BLOCK].view(blocks, _BLOCK).amax(1)
    bound = maxima.topk(k, sorted=False).values.min()
    return ((scores >= bound) & eligible).nonzero().flatten()
