"""Links that a network's own topology predicts."""

from __future__ import annotations

import torch
from torch import Tensor


def ch3_l3(links: Tensor) -> Tensor:
    """Cannistraci-Hebb 3 over paths of length 3 in a bipartite network; float32, [n, m], for boolean `links` [n, m].

    The score of a pair (v, u) without a link is the sum over all paths v - y - x - u, x of v's side and y of u's, of
    1 / sqrt((1 + e(x)) (1 + e(y))) (Muscoloni et al. 2020; CHT, Zhang et al. 2024, Equation 1). e counts a node's
    links that leave the local community: neither to v or u nor to another node on such a path. Pairs that have a link
    get a number without meaning. Costs n times the sum of the squared degrees of v's side.
    """
    a = links.to(torch.float32)
    degree = a.sum(0)
    scores = torch.zeros_like(a)
    for x in a.any(1).nonzero().flatten().tolist():
        near = links[x].nonzero().flatten()  # y and u alike
        b = a[:, near]
        of_x = _root(len(near) - b.sum(1))  # x's links but for those to v's neighbours: 1 + e(x), as u is one of them
        of_y = _root(degree[near, None] - b.T @ b)
        scores.index_add_(1, near, (b * of_x[:, None]) @ of_y)
    return scores


def _root(outside: Tensor) -> Tensor:
    """1 / sqrt, 0 where the pair of the path's ends has a link."""
    return torch.where(outside > 0, outside.clamp(min=1).rsqrt(), 0)
