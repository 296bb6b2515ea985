"""Prune rules against a direct computation: which weights an update removes, ties included."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from east_plugins import Masking, UsageError
from east_plugins.options import sources
from east_plugins.plugins import registry
from east_plugins.plugins.protocols import Layer

EPSILON = 1e-8
SCORES = {
    "magnitude": lambda w, g: w.abs(),
    "MEST": lambda w, g: w.abs() + g.abs(),
    "sensitivity": lambda w, g: g.abs() / (w.abs() + EPSILON),
    "rsensitivity": lambda w, g: w.abs() / (g.abs() + EPSILON),
    "SNIP": lambda w, g: (w * g).abs(),
    "taylor": lambda w, g: (w * g) ** 2,
}
OVER_STEPS = SCORES | {"bilevel": lambda w, g: (g - w) * g}


def host_of(seed=0, rate=0.3, density=0.5, **settings):
    """A host in float64 after a backward pass, its weights and gradients rounded so that many tie."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 9), nn.ReLU(), nn.Linear(9, 4))
    model.double()
    host = Masking(
        torch.optim.SGD(model.parameters(), 0.1), death_rate=rate, update_frequency=1, seed=seed,
        **{"growth_mode": "random", **settings},
    )  # fmt: skip
    host.add_module(model, density=density)
    F.cross_entropy(model(torch.randn(8, 2, 6, 6, dtype=torch.float64)), torch.arange(8) % 4).backward()
    with torch.no_grad():
        for weight in host.weights.values():
            weight.mul_(8).round_().div_(8)
            weight.grad.mul_(32).round_().div_(32)
    host.apply_mask()
    return model, host


def removed_scores(score, host, found):
    """Scores of what was removed and of what stays, layer by layer."""
    for name, weight in host.weights.items():
        values = score(weight.detach(), weight.grad)
        mask, gone = host.masks[name], found[name]
        assert not (gone & ~mask).any()
        yield values[gone], values[mask & ~gone], int(mask.sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", SCORES)
def test_a_rule_removes_the_lowest_of_its_scores_in_every_layer(rule, seed):
    _, host = host_of(seed, death_mode=rule)
    for gone, stays, active in removed_scores(SCORES[rule], host, host.removed_by(rule, 0.3)):
        assert len(gone) == int(0.3 * active)
        assert gone.max() <= stays.min()  # of equal scores any may go, and no more


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", SCORES)
def test_over_all_layers_a_rule_removes_the_lowest_of_all(rule, seed):
    _, host = host_of(seed)
    parts = list(removed_scores(SCORES[rule], host, host.removed_by(rule, 0.3, "all")))
    active = sum(each[2] for each in parts)
    assert sum(len(gone) for gone, _, _ in parts) == int(0.3 * active)
    lowest = torch.cat([torch.cat([gone, stays]) for gone, stays, _ in parts]).sort().values[: int(0.3 * active)]
    assert torch.equal(torch.cat([gone for gone, _, _ in parts]).sort().values, lowest)


@pytest.mark.parametrize("scope", ["local", "all"])
@pytest.mark.parametrize("positive", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rate", [0.2, 0.45])
def test_set_removes_half_from_each_sign_as_far_as_there_are_any(rate, positive, scope):
    _, host = host_of(density=0.6)
    with torch.no_grad():
        for name, weight in host.weights.items():
            sizes = (torch.rand_like(weight) * 4).ceil() / 4
            sign = torch.where(torch.rand_like(weight) < positive, 1.0, -1.0)
            weight.copy_(sizes * sign * host.masks[name])
    found = host.removed_by("SET", rate, scope)
    values = [(w.detach()[host.masks[n] & ~found[n]], w.detach()[found[n]]) for n, w in host.weights.items()]
    if scope == "all":
        values = [tuple(torch.cat(part) for part in zip(*values, strict=True))]
    for stays, gone in values:
        wanted = int(rate * (len(stays) + len(gone)))
        there = [int((stays * s > 0).sum() + (gone * s > 0).sum()) for s in (1, -1)]
        removed = [int((gone * s > 0).sum()) for s in (1, -1)]
        assert sum(removed) == wanted
        assert abs(removed[0] - removed[1]) <= 1 or min(removed) == min(there)
        for s in (1, -1):
            mine, all_of_it = gone[gone * s > 0].abs(), torch.cat([gone, stays])
            assert torch.equal(mine.sort().values, all_of_it[all_of_it * s > 0].abs().sort().values[: len(mine)])


@pytest.mark.parametrize("scope", ["local", "all"])
def test_set_removes_zeros_first_and_then_half_from_each_sign(scope):
    _, host = host_of(density=0.6)
    with torch.no_grad():
        for name, weight in host.weights.items():
            weight.copy_((torch.randn_like(weight) * (torch.rand_like(weight) < 0.7)) * host.masks[name])
    everything = {}
    for rate in (0.1, 0.5):
        found = host.removed_by("SET", rate, scope)
        parts = [(host.masks[n], found[n], w.detach()) for n, w in host.weights.items()]
        if scope == "all":
            parts = [tuple(torch.cat([part.flatten() for part in each]) for each in zip(*parts, strict=True))]
        everything[rate] = [(int((w[m] == 0).sum()), int(m.sum()), w[gone]) for m, gone, w in parts]
    for zeros, active, gone in everything[0.1]:
        assert zeros > int(0.1 * active) == int((gone == 0).sum()) == len(gone)
    for zeros, active, gone in everything[0.5]:
        assert zeros == int((gone == 0).sum()) and len(gone) == int(0.5 * active)
        assert abs(int((gone > 0).sum()) - int((gone < 0).sum())) <= 1


def test_random_removes_any_weight():
    seen = torch.zeros(4, 9, dtype=torch.bool)
    _, host = host_of(density=1.0)
    for seed in range(60):
        host.generator.manual_seed(seed)
        seen |= host.removed_by("random", 0.3)["5.weight"]
    assert seen.all()


def test_equal_weights_of_one_sign_are_drawn_at_random_by_set():
    _, host = host_of(density=1.0)
    with torch.no_grad():
        host.weights["5.weight"].fill_(0.5)
    seen = torch.zeros(4, 9, dtype=torch.bool)
    for seed in range(60):
        host.generator.manual_seed(seed)
        seen |= host.removed_by("SET", 0.3)["5.weight"]
    assert seen.all()


def test_mest_is_magnitude_at_lam_0_and_the_gradient_at_large_lam():
    _, host = host_of(1)
    state = host.generator.get_state()
    for lam, score in ((0.0, SCORES["magnitude"]), (1e9, lambda w, g: g.abs())):
        for gone, stays, _ in removed_scores(score, host, host.removed_by("MEST", 0.3, lam=lam)):
            assert gone.max() <= stays.min()
    assert torch.equal(host.generator.get_state(), state)  # asking changes nothing


@pytest.mark.parametrize(
    "rule, score", [("RunningMagnitude", "magnitude"), ("RunningSNIP", "SNIP"), ("bilevel", "bilevel")]
)
def test_running_averages_follow_their_equation_and_begin_anew_with_a_weight(rule, score):
    model, host = host_of(rate=0.2, death_mode=rule, growth_mode="gradient", options={"pruning": {"beta": 0.8}})
    host.prune_every_k_steps = 3
    expected = {}
    for step in range(1, 10):
        x = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        host.optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 4).backward()
        grads = {name: weight.grad.clone() for name, weight in host.weights.items()}
        before = copy.deepcopy(dict(host.masks))
        host.optimizer.param_groups[0]["lr"] = 0.05
        kept = {name: mask.clone() for name, mask in before.items()}
        host.step()
        for name, weight in host.weights.items():
            now = weight.detach() if step % 3 else None
            if now is None:  # the update zeroed what it dropped, after the average had seen it
                assert (host.state_dict()["average"][name][~host.masks[name]] == 0).all()
                assert (host.state_dict()["average"][name][host.masks[name] & ~kept[name]] == 0).all()
                expected[name] = host.state_dict()["average"][name].clone()
                continue
            value = OVER_STEPS[score](now, grads[name]) * host.masks[name]
            expected[name] = value if name not in expected else 0.8 * expected[name] + 0.2 * value
            torch.testing.assert_close(host.state_dict()["average"][name], expected[name], rtol=1e-12, atol=1e-15)


def test_a_running_average_of_another_rule_cannot_be_asked_for():
    _, host = host_of()
    with pytest.raises(UsageError, match="`death_mode` RunningSNIP averages over steps"):
        host.removed_by("RunningSNIP", 0.3)


def test_every_layer_grows_back_what_it_lost_where_all_are_pruned_together():
    _, host = host_of(death_mode="magnitude", prune_scope="all", rate=0.6)
    counts, found = dict(host.name2nonzeros), host.removed_by("magnitude", 0.6, "all")
    host.truncate_weights()
    assert dict(host.name2nonzeros) == counts
    assert len({int(gone.sum()) / counts[name] for name, gone in found.items()}) > 1  # the rate is not each layer's own


@pytest.mark.parametrize("flags, message", [
    ({"death": "MEST", "death_lam": -1.0}, "`death_lam` must be at least 0"),
    ({"death": "RunningSNIP", "death_beta": 1.0}, "`death_beta` must be from 0 on and below 1"),
    ({"decay_schedule": "stepped", "decay_schedule_every": 0}, "`decay_schedule_every` must be at least 1"),
    ({"prune_scope": "alll"}, "`prune_scope` must be one of local, global, all"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(flags, message):
    with pytest.raises(UsageError, match=message):
        sources.from_flags({"method": "rigl", **flags}).resolve(10)


def test_the_stepped_rate_is_099_every_600_steps():
    rate = sources.from_flags({"method": "rigl", "decay_schedule": "stepped", "epochs": 100}).resolve(60).rate_decay()
    assert rate(0) == rate(599) == 0.5
    assert rate(600) == pytest.approx(0.5 * 0.99) and rate(3000) == pytest.approx(0.5 * math.pow(0.99, 5))


def test_negative_weights_of_dormant_neurons_go_first_and_largest_first_then_the_smallest():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), death_mode="dormant", growth_mode="random")
    host.add_module(model, density=1.0)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(24.0).view(4, 6).add(1).mul(torch.tensor([1.0, -1]).repeat(12).view(4, 6)))
        model[0].weight[1] = torch.tensor([9.0, -3, 0.5, -7, 0.25, -0.125])
        model[0].bias[1] = -1e6  # its neuron passes nothing
    model(torch.rand(8, 6) + 0.1).square().sum().backward()
    model[0].weight.grad[0] += 1  # every other neuron has a gradient
    model[0].weight.grad[2:] += 1
    assert not model[0].weight.grad[1].any()
    gone = [host.removed_by("dormant", k / 24)["0.weight"] for k in range(1, 6)]
    order = [
        model[0].weight[now & ~before].item() for before, now in zip([gone[0] & False, *gone[:-1]], gone, strict=True)
    ]
    assert order == [-7, -3, -0.125, 0.25, 0.5]
    none = host.removed_by("dormant", 2 / 24, tau=0.0)["0.weight"]
    assert model[0].weight[none].tolist() == [-3, -7]
    with pytest.raises(UsageError, match="`tau` must be at least 0"):
        host.removed_by("dormant", 0.1, tau=-1.0)


POINTWISE = [name for name in registry.pruning.names() if registry.pruning.entry(name).meta.get("pointwise")]


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_rule_gives_active_weights_the_same_importance_alone(name):
    draw = torch.Generator().manual_seed(0)
    weight, grad, average = (torch.randn(6, 5, 3, 3, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(weight.shape, generator=draw) < 0.2
    layer = Layer("l", weight * mask, mask, mask.clone(), draw, dense_grad=grad, score_average=average)
    rule, places = registry.pruning.bound(name), mask.flatten().nonzero().squeeze(1)
    torch.testing.assert_close(rule(layer.at(places)), rule(layer).flatten()[places], rtol=0, atol=0)


def test_most_rules_are_pointwise_and_those_of_whole_layers_are_not():
    assert {"magnitude", "SNIP", "MEST", "RunningMagnitude"} <= set(POINTWISE)
    assert not {"SET", "dormant"} & set(POINTWISE)
