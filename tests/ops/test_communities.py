"""Link prediction against paths that are walked one by one."""

import math

import pytest
import torch

from east_plugins import Masking
from east_plugins.ops.communities import ch3_l3


def by_paths(links, v, u):
    """CH3-L3 as it is defined, on the graph of rows and columns."""
    n, m = links.shape
    around = [{n + j for j in range(m) if links[i, j]} for i in range(n)]
    around += [{i for i in range(n) if links[i, j]} for j in range(m)]
    end = n + u
    paths = [(y, x) for y in around[v] for x in around[y] - {v} if end in around[x]]
    internal = dict.fromkeys({node for path in paths for node in path}, 0)
    for y, x in paths:
        internal[y] += 1
        internal[x] += 1
    leaving = {node: len(around[node] - {v, end}) - inside for node, inside in internal.items()}
    return sum(1 / math.sqrt((1 + leaving[x]) * (1 + leaving[y])) for y, x in paths)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_scores_are_sums_over_paths_of_length_three(shape, density):
    links = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < density
    scores = ch3_l3(links)
    for v, u in (~links).nonzero().tolist():
        assert scores[v, u].item() == pytest.approx(by_paths(links, v, u), rel=1e-5, abs=1e-6)


def test_a_closed_community_counts_in_full_and_links_that_leave_it_count_less():
    closed = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    assert ch3_l3(closed)[0, 2] == 1  # v 0, y 1, x 1, u 2: nothing leaves
    leaving = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    assert ch3_l3(leaving)[0, 2].item() == pytest.approx(1 / math.sqrt(2))
    assert not ch3_l3(torch.zeros(3, 4, dtype=torch.bool)).any()


def test_a_host_grows_what_the_pruned_topology_predicts_and_needs_no_gradient():
    model = torch.nn.Linear(40, 25)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    host = Masking(optimizer, death_rate=0.3, growth_mode="ch3-l3", update_frequency=1, seed=0)
    host.add_module(model, density=0.1)
    before = host.masks["weight"].clone()
    left = before & ~host.removed_by("magnitude", 0.3)["weight"]
    assert int(left.sum()) == 70 and "grad" not in host.needs
    host.truncate_weights()
    grown, scores = host.masks["weight"] & ~left, ch3_l3(left)
    assert host.nonzeros == 100 and int(grown.sum()) == 30
    assert scores[grown].min() >= scores[~host.masks["weight"]].max()
