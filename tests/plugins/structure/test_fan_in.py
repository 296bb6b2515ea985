"""Constant fan-in: the invariant after every update, and SRigL's step against one written out neuron by neuron."""

import copy

import pytest
import torch
from torch import nn

from east_plugins import Masking, UsageError
from east_plugins.plugins.density import Constant, Gradual
from east_plugins.plugins.protocols import Candidate, Layer, Moment
from east_plugins.plugins.structure.fan_in import ConstantFanIn


def moment(seed=0):
    return Moment(torch.Generator().manual_seed(seed), None, nn.Identity(), None)


def candidate(mask, importance, growth, budget, rate):
    layer = Layer("l", importance, mask, mask.clone(), torch.Generator())
    return Candidate(layer, budget, rate, lambda _: importance, lambda _: growth)


def fan_ins(mask):
    return mask.flatten(1).sum(1)


def by_neurons(mask, importance, growth, budget, rate, gamma):
    """SRigL, Section 3.1, in plain Python, for scores without ties."""
    n, m = mask.shape
    neurons = int(mask.any(1).sum())
    k = min(m, max(1, budget // neurons))
    wanted = k * min(neurons, budget)
    active = sorted(((importance[i, j].item(), i, j) for i, j in mask.nonzero().tolist()), reverse=True)
    idle = sorted(((growth[i, j].item(), i, j) for i, j in (~mask).nonzero().tolist()), reverse=True)
    base = min(len(active), wanted)
    keep = base - int(rate * base)
    kept, grown = active[:keep], idle[: wanted - keep]
    salient = [sum(i == row for _, row, _ in kept + grown) for i in range(n)]
    alive = [i for i in range(n) if salient[i] >= max(1, gamma * k) or not gamma]
    k = min(m, budget // len(alive))
    new = torch.zeros_like(mask)
    for i in alive:
        for _, _, j in [each for each in kept if each[1] == i][:k]:
            new[i, j] = True
        free = sorted(((growth[i, j].item(), j) for j in range(m) if not new[i, j]), reverse=True)
        for _, j in free[: k - int(new[i].sum())]:
            new[i, j] = True
    return new


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5])
def test_an_update_is_that_of_the_paper(gamma):
    rule, draw, neurons = ConstantFanIn(gamma), torch.Generator().manual_seed(0), []
    scales = torch.linspace(0.4, 1, 12)[:, None]  # some neurons matter less
    last = candidate(torch.ones(3, 4) > 0, torch.rand(3, 4), torch.rand(3, 4), 12, 0.3)
    for budget, rate in [(62, 0.4), (62, 0.1), (90, 0.3), (50, 0.5), (72, 0.0)] * 4:
        mask = rule.start((12, 20), 62, draw)
        importance, growth = torch.rand(12, 20, generator=draw) * scales, torch.rand(12, 20, generator=draw) * scales
        expected = by_neurons(mask, importance, growth, budget, rate, gamma)
        new = rule.update([candidate(mask, importance, growth, budget, rate), last], moment())[0]
        assert torch.equal(new, expected)
        active = fan_ins(new)[fan_ins(new) > 0]
        assert len(active.unique()) == 1 and int(new.sum()) == budget // len(active) * len(active)
        neurons.append(len(active))
    assert (min(neurons) < 12) == (gamma > 0)


def test_neurons_are_ablated_and_come_back():
    rule, mask = ConstantFanIn(0.5), torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :4] = True
    last = candidate(torch.ones(2, 2) > 0, torch.ones(2, 2), torch.ones(2, 2), 4, 0.0)
    weight = torch.tensor([1.0, 1, 1, 0.01])[:, None] + torch.rand(4, 8) * 0.001
    towards = torch.tensor([1.0, 0.1, 0.1, 0.01])[:, None] + torch.rand(4, 8) * 0.001
    (less, _) = rule.update([candidate(mask, weight, towards, 16, 0.25), last], moment())
    assert fan_ins(less).tolist() == [5, 5, 5, 0]  # 16 // 3
    towards[3] += 9
    (more, _) = rule.update([candidate(less, weight * less, towards, 16, 0.3), last], moment())
    assert fan_ins(more).tolist() == [4, 4, 4, 4]


def test_of_equal_scores_any_is_taken_and_the_fan_in_is_exact():
    rule, seen = ConstantFanIn(0.0), torch.zeros(10, 30)
    for seed in range(40):
        mask = rule.start((10, 30), 105, torch.Generator().manual_seed(seed))
        assert fan_ins(mask).tolist() == [10] * 10
        asked = candidate(mask, torch.ones(10, 30), torch.zeros(10, 30), 105, 0.5)
        new = rule.update([asked], moment(seed))[0]
        assert fan_ins(new).tolist() == [10] * 10
        assert int((mask & new).sum()) >= 50
        seen += new
    assert seen.min() > 0 and seen.max() < 40


@pytest.mark.parametrize(("budget", "neurons", "each"), [(7, 7, 1), (1, 1, 1), (10, 10, 1), (29, 10, 2), (200, 10, 20)])
def test_a_small_budget_leaves_neurons_out(budget, neurons, each):
    mask = ConstantFanIn().start((10, 4, 5), budget, torch.Generator())
    counts = fan_ins(mask)
    assert int((counts > 0).sum()) == neurons and set(counts.tolist()) <= {0, each}
    last = candidate(mask, torch.rand(10, 4, 5), torch.rand(10, 4, 5), budget, 0.5)
    assert int(ConstantFanIn().update([last], moment())[0].sum()) == neurons * each


@pytest.mark.parametrize("schedule", [Constant(0.1, 1), Gradual(0.1, initial=0.5, frequency=1, stop=8, end=12)])
def test_every_update_of_a_host_keeps_the_fan_in_and_never_takes_more_than_the_density(schedule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, groups=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))  # fmt: skip
    settings = dict(growth_mode="gradient", structure="fan-in", options={"structure": {"gamma_sal": 0.6}}, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    host = Masking(optimizer, death_rate=0.3, schedule=schedule, **settings)
    host.add_module(model, density=0.1)
    ablated = 0
    for step in range(1, 12):
        host.optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        before = copy.deepcopy(dict(host.masks))
        host.step()
        assert any(not torch.equal(before[name], mask) for name, mask in host.masks.items())
        for name, mask in host.masks.items():
            counts = fan_ins(mask)
            assert len(counts[counts > 0].unique()) == 1
            assert host.name2nonzeros[name] == int(mask.sum())
            assert not host.weights[name][~mask].any()
            ablated += int((counts == 0).sum())
        asked = host.target_nonzeros(step)
        assert asked - sum(len(mask) for mask in host.masks.values()) < host.nonzeros <= asked
    assert ablated and host.is_at(11) and fan_ins(host.masks["6.weight"]).min() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"redistribution_mode": "nonzeros"}, "no `redistribution`"),
        ({"prune_scope": "all"}, "no `prune_scope`"),
        ({"keep_connected": True}, "no `keep_connected`"),
        ({"structure": object()}, "must have `start` and `update`"),
        ({"options": {"structure": {"gamma_sal": 2}}}, "`gamma_sal` must be in"),
        ({"structure": "fan-out"}, "fan-out"),
    ],
)
def test_what_does_not_go_with_a_structure_is_said(settings, words):
    optimizer = torch.optim.SGD(nn.Linear(3, 4).parameters(), 0.1)
    with pytest.raises(UsageError, match=words):
        Masking(optimizer, **{"structure": "fan-in", **settings})


def test_an_allocation_that_draws_masks_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), structure="fan-in")
    with pytest.raises(UsageError, match="`sparse_init` magnitude draws masks, and so does `structure`"):
        host.add_module(model, density=0.5, sparse_init="magnitude")
