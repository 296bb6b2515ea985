"""Whole diagonals: where they lie, that updates keep them whole, and which ones an update takes."""

import pytest
import torch
from torch import nn

from east_plugins import Masking, UsageError
from east_plugins.plugins.protocols import Candidate, Layer, Moment
from east_plugins.plugins.structure.diagonals import Diagonals, diagonals


def moment(seed=0):
    return Moment(torch.Generator().manual_seed(seed), None, nn.Identity(), None)


def candidate(mask, importance, growth, budget, rate):
    layer = Layer("l", importance, mask, mask.clone(), torch.Generator())
    return Candidate(layer, budget, rate, lambda _: importance, lambda _: growth)


def held(mask):
    """Which diagonals a mask has; every active weight lies on one of them."""
    places = diagonals(mask.shape)
    whole = mask.flatten()[places].all(1)
    assert int(mask.sum()) == int(whole.sum()) * places.shape[1]
    return whole


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (4, 2, 3, 3), (1, 6)])
def test_diagonals_cover_every_weight_once_and_step_by_one_row_and_one_column(shape):
    places = diagonals(shape)
    rows, columns = shape[0], torch.Size(shape).numel() // shape[0]
    assert places.shape == (max(rows, columns), min(rows, columns))
    assert sorted(places.flatten().tolist()) == list(range(rows * columns))
    row, column = places // columns, places % columns
    assert torch.equal((row[:, 1:] - row[:, :-1]) % rows, torch.ones_like(row[:, 1:]) % rows)
    assert torch.equal((column[:, 1:] - column[:, :-1]) % columns, torch.ones_like(row[:, 1:]) % columns)


@pytest.mark.parametrize(("budget", "rate"), [(30, 0.5), (30, 0.3), (52, 0.4), (12, 0.5), (30, 0.0), (78, 0.2)])
@pytest.mark.parametrize("shape", [(6, 13), (13, 6), (6, 13, 1, 1)])
def test_an_update_drops_the_least_and_grows_the_most(shape, budget, rate):
    draw, rule = torch.Generator().manual_seed(0), Diagonals()
    for _ in range(5):
        mask = rule.start(shape, 34, draw)
        before = held(mask)
        assert int(before.sum()) == 5
        importance, growth = torch.rand(shape, generator=draw), torch.rand(shape, generator=draw)
        new = held(rule.update([candidate(mask, importance, growth, budget, rate)], moment())[0])
        count = budget // 6
        base = min(5, count)
        means = [values.flatten()[diagonals(shape)].mean(1) for values in (importance, growth)]
        kept = sorted(before.nonzero().flatten().tolist(), key=lambda d: -means[0][d])[: base - int(rate * base)]
        idle = sorted(set(range(13)) - set(kept), key=lambda d: -means[1][d])
        assert set(new.nonzero().flatten().tolist()) == {*kept, *idle[: count - len(kept)]}


def test_of_equal_diagonals_any_is_taken():
    seen = torch.zeros(12)
    for seed in range(60):
        mask = Diagonals().start((4, 12), 24, torch.Generator().manual_seed(seed))
        same = torch.ones(4, 12)
        new = held(Diagonals().update([candidate(mask, same, same, 24, 0.5)], moment(seed))[0])
        assert int(new.sum()) == 6 and int((new & held(mask)).sum()) >= 3
        seen += new
    assert seen.min() > 10 and seen.max() < 50


def test_every_update_of_a_host_keeps_diagonals_whole():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    settings = dict(growth_mode="gradient", structure="diagonals", update_frequency=1, death_rate=0.5)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **settings)
    host.add_module(model, density=0.4)
    first = {name: mask.clone() for name, mask in host.masks.items()}
    for step in range(10):
        host.optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        host.step()
        assert (
            sum(int(held(mask).sum()) * min(len(mask), mask[0].numel()) for mask in host.masks.values())
            == host.nonzeros
        )
        assert host.target_nonzeros(step) - 13 < host.nonzeros <= host.target_nonzeros(step)
    assert all(not torch.equal(first[name], mask) for name, mask in host.masks.items())


def test_a_layer_whose_budget_holds_no_diagonal_is_named():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 30))
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), structure="diagonals")
    with pytest.raises(UsageError, match="a layer of 30x40 weights has 24 active weights, and a diagonal 30"):
        host.add_module(model, density=0.02, sparse_init="uniform")
    assert not host.modules
