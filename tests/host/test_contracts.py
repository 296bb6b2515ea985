"""The host in less common use: resumed, with a gradient scaler, layers removed, global scope, one-shot pruning."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from east_plugins import CosineDecay, Engine, Masking, UsageError, growth
from east_plugins.host import gradients
from east_plugins.plugins.activation import factory
from east_plugins.plugins.activation.phased import PhaseOut, attach
from east_plugins.plugins.density import Constant, Cyclic, OneShot
from east_plugins.plugins.growth import gradient
from east_plugins.plugins.pruning import taylor
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def network(name="resnet20"):
    torch.manual_seed(0)
    return models.build(name, 10, width=8)  # channels-last convolutions of fewer crash oneDNN


def host_of(model, density=0.05, sparse_init="ERK", lr=0.05, **kwargs):
    kwargs = {"redistribution_mode": "none", "growth_mode": "gradient", "death_rate": 0.4, "seed": 0, **kwargs}
    host = Masking(torch.optim.SGD(model.parameters(), lr, momentum=0.9), **kwargs)
    host.add_module(model, density=density, sparse_init=sparse_init, input_shape=(3, 16, 16))
    return host


def train(model, host, steps, first=0):
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, 16, 16, generator=draw), torch.randint(10, (8,), generator=draw)
        host.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()


def saved(model, host):
    return copy.deepcopy([model.state_dict(), host.optimizer.state_dict(), host.state_dict()])


class OnlyCounts:
    """A decay like ITOP's own: it knows its step, and cannot be saved."""

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1

    def get_dr(self):
        return 0.5 - 0.005 * self.steps


@pytest.mark.parametrize("decay", [lambda: CosineDecay(0.5, 100), OnlyCounts], ids=["ours", "itop's"])
def test_a_resumed_host_goes_on_at_the_prune_rate_where_it_stopped(decay):
    def build():
        model = network()
        return model, host_of(model, death_rate_decay=decay(), update_frequency=10)

    straight = build()
    train(*straight, 80)
    resumed = build()
    for part, state in zip((resumed[0], resumed[1].optimizer, resumed[1]), saved(*straight), strict=True):
        part.load_state_dict(state)
    for each in (straight, resumed):
        train(*each, 10, first=80)
    assert straight[1].death_rate == resumed[1].death_rate < 0.2
    assert straight[1].num_remove == resumed[1].num_remove
    for name, mask in straight[1].masks.items():
        assert torch.equal(mask, resumed[1].masks[name])


def test_a_resumed_host_keeps_the_shares_that_scores_gave_the_layers():
    model = network()
    host = host_of(model, sparse_init="SynFlow", update_frequency=2)
    counts = dict(host.name2nonzeros)
    state = saved(model, host)
    torch.manual_seed(99)
    other = models.build("resnet20", 10, width=8)  # other weights, other scores
    resumed = host_of(other, sparse_init="SynFlow", update_frequency=2)
    assert resumed.name2nonzeros != counts
    resumed.load_state_dict(state[2])
    train(other, resumed, 2)
    assert resumed.name2nonzeros == counts


def step_with_scaler(model, host, scaler, overflow=False):
    host.optimizer.zero_grad()
    loss = F.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8))
    scaler.scale(loss * (1e38 if overflow else 1)).backward()
    host.step(scaler=scaler)
    scaler.update()


def test_an_overflow_leaves_no_trace_in_running_averages():
    model = network()
    host = host_of(model, growth_mode="momentum", update_frequency=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(7):
        step_with_scaler(model, host, scaler, overflow=step == 1)
    assert scaler.get_scale() < 1024
    assert all(bool(average.isfinite().all()) for average in host.state_dict()["momentum"].values())


def test_an_update_waits_for_a_step_that_the_scaler_does_not_skip():
    model = network()
    host = host_of(model, update_frequency=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(host.masks)

    def moved():
        return any(not torch.equal(before[name], mask) for name, mask in host.masks.items())

    step_with_scaler(model, host, scaler)
    step_with_scaler(model, host, scaler, overflow=True)
    assert not moved() and host.dense_gradient_next and host.state_dict()["put_off"]
    step_with_scaler(model, host, scaler)
    assert moved() and not host.state_dict()["put_off"]
    assert sum(int(mask.sum()) for mask in host.masks.values()) == host.nonzeros


@pytest.mark.parametrize("tied", [False, True], ids=["own", "shared"])
def test_removing_a_layer_leaves_the_budgets_of_the_others(tied):
    model = network()
    if tied:
        share(model)
    host = host_of(model, update_frequency=2)
    before, size = dict(host.name2nonzeros), host.theoretical_size
    host.remove_weight("fc")
    removed = before.pop("fc.weight")
    assert host.name2nonzeros == before and host.theoretical_size == size - model.fc.weight.numel()
    train(model, host, 2)
    assert host.nonzeros == sum(before.values()) and removed > 0
    assert all(abs(host.name2nonzeros[name] - count) <= 1 for name, count in before.items())


def test_one_shot_pruning_keeps_the_most_important_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    host = host_of(model, schedule=OneShot(0.05, stop=4), death_rate=0.5)
    train(model, host, 3)
    x = torch.randn(8, 3, 16, 16)
    host.optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(8)).backward()
    dense = copy.deepcopy(host.weights["1.weight"].detach())
    host.optimizer.param_groups[0]["lr"] = 0.0
    host.step()
    kept = host.masks["1.weight"]
    assert int(kept.sum()) == host.nonzeros == round(0.05 * dense.numel())
    largest = dense.abs().flatten().topk(host.nonzeros).indices
    assert torch.equal(kept.flatten().nonzero().flatten(), largest.sort().values)


def test_global_scope_replaces_within_layers_and_drops_over_all():
    """GraNet, Algorithm 1: at a constant density no layer loses weights to another."""
    model = network()
    host = host_of(model, prune_scope="global", update_frequency=1)
    counts = dict(host.name2nonzeros)
    train(model, host, 3)
    assert host.name2nonzeros == counts
    falling = Cyclic(
        0.05, multiplier=4, cycles=1, length=4, cyclic_frequency=1, frequency=1, end=99, replace=True
    )  # fmt: skip
    model = network()
    host = host_of(model, prune_scope="global", schedule=falling)
    with torch.no_grad():
        host.weights["conv1.weight"].mul_(1e-3)
    before = host.name2nonzeros["conv1.weight"]
    train(model, host, 4)
    assert host.nonzeros == sum(counts.values()) and host.name2nonzeros["conv1.weight"] < before


def test_rules_given_as_functions_say_what_they_need():
    model = network()
    host = host_of(model, growth_mode=gradient, death_mode=taylor, update_frequency=2)
    train(model, host, 4)
    by_name = network()
    named = host_of(by_name, growth_mode="gradient", death_mode="taylor", update_frequency=2)
    train(by_name, named, 4)
    for name, mask in named.masks.items():
        assert torch.equal(mask, host.masks[name])
    assert growth.get("gradient") is gradient


def test_state_of_phased_out_activations_is_let_go():
    model = network()
    phased = attach(model, factory("dyrelu-b"), (3, 16, 16), phase_out=PhaseOut(1, 3))
    host = host_of(model, plugins=[phased], update_frequency=None)
    known = {id(parameter) for parameter in phased.parameters()}
    train(model, host, 5)
    assert not phased.sites
    assert not known & {id(parameter) for parameter in (*host.packed._states, *host.optimizer.state)}


def test_a_host_works_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for density in (0.05, 0.3):
            model = network()
            host = host_of(model, density, update_frequency=2)
            train(model, host, 5)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, mask in host.masks.items():
        assert (host.weights[name][~mask] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_masked_at_once_as_on_cuda_are_those_masked_one_by_one(channels_last, monkeypatch):
    hosts = []
    for at_once in (False, True):
        monkeypatch.setattr(gradients, "_at_once", lambda grads, at_once=at_once: at_once)
        model = network()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        host = host_of(model, 0.3, update_frequency=3)
        train(model, host, 8)
        hosts.append(host)
    for name, mask in hosts[0].masks.items():
        assert torch.equal(mask, hosts[1].masks[name])
        torch.testing.assert_close(hosts[0].weights[name], hosts[1].weights[name], rtol=0, atol=0)


def test_what_is_kept_of_masks_for_cuda_follows_them_in_place(monkeypatch):
    """A captured step replays operations on the same memory, and no Python."""
    monkeypatch.setattr(gradients, "_at_once", lambda grads: True)
    model = network()
    host = host_of(model, 0.3, update_frequency=None)
    train(model, host, 1)
    kept = {name: factor.values for name, factor in host._stepping.masked._factors.items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(host.masks)
    host.truncate_weights()
    assert kept and any(not torch.equal(before[name], host.masks[name]) for name in kept)
    for name, values in kept.items():
        assert torch.equal(values, host.masks[name].float())
    host.load_state_dict({**host.state_dict(), "masks": before})
    for name, values in kept.items():
        assert torch.equal(values, before[name].float())


def test_saved_state_has_the_memory_format_of_the_weights():
    model = network().to(memory_format=torch.channels_last)
    host = host_of(model, update_frequency=None)
    train(model, host, 1)
    state = host.optimizer.state_dict()["state"]
    for index, parameter in enumerate(model.parameters()):
        assert state[index]["momentum_buffer"].stride() == parameter.stride()


def test_itop_rate_and_density_have_one_denominator():
    model = network()
    share(model)
    host = host_of(model, schedule=Constant(0.05))
    assert host.fired_masks_update()[1] == pytest.approx(host.nonzeros / host.theoretical_size)


def test_stepping_before_add_module_is_refused():
    model = network()
    host = Masking(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UsageError, match="add_module"):
        host.step()


def test_a_host_that_refused_a_density_takes_the_next():
    model = network()
    host = Masking(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(UsageError, match="active weights"):
        host.add_module(model, density=1e-5)
    host.add_module(model, density=0.1)
    assert host.nonzeros == round(0.1 * host.theoretical_size)


def test_the_optimizer_of_another_model_is_refused():
    host = Masking(torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(UsageError, match="optimizer"):
        host.add_module(network(), density=0.1)


@pytest.mark.parametrize(
    "answer",
    [lambda layer: layer.weight.abs().mean(), lambda layer: layer.weight.flatten(1).norm(dim=1), lambda layer: None],
    ids=["one number", "one a channel", "None"],
)
@pytest.mark.parametrize("kind", ["growth_mode", "death_mode"])
def test_answers_of_rules_that_are_no_scores_are_refused(kind, answer):
    model = network()
    host = host_of(model, **{"growth_mode": "random", kind: answer}, update_frequency=1)
    with pytest.raises(UsageError, match="one score for each of the"):
        train(model, host, 1)


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(UsageError, match="must be a function"):
        host_of(network(), growth_mode="math:pi")


def test_transposed_convolutions_get_values_for_their_own_fan_in():
    model = nn.Sequential(nn.ConvTranspose2d(64, 4, 3), nn.Conv2d(4, 8, 3))
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="random", seed=0)
    host.add_module(model, density=1.0, weight_init="sparse-fan-in")
    assert float(model[0].weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def updates_of(host, model, steps):
    """The steps after which the topology was another."""
    found, before = [], {name: mask.clone() for name, mask in host.masks.items()}
    for step in range(steps):
        train(model, host, 1, first=step)
        if any(not torch.equal(before[name], mask) for name, mask in host.masks.items()):
            found.append(host.steps)
        before = {name: mask.clone() for name, mask in host.masks.items()}
    return found


@pytest.mark.parametrize("schedule", [None, Constant(0.05, 5)], ids=["of its own", "given"])
def test_the_steps_between_updates_can_be_set_at_any_time(schedule):
    model = network()
    host = host_of(model, schedule=schedule, update_frequency=5)
    assert host.prune_every_k_steps == 5
    host.prune_every_k_steps = 3
    assert updates_of(host, model, 6) == [3, 6] and host.prune_every_k_steps == 3
    host.prune_every_k_steps = None
    assert updates_of(host, model, 3) == []
    host.prune_every_k_steps = 2
    assert updates_of(host, model, 3) == [10, 12]


def test_the_steps_between_updates_set_before_a_module_is_added_hold():
    model = network()
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="random", seed=0)
    host.prune_every_k_steps = 2
    host.add_module(model, density=0.05)
    assert updates_of(host, model, 4) == [2, 4]


def test_cycles_keep_the_updates_that_their_density_needs():
    model = network()
    cycle = Cyclic(0.05, multiplier=4, cycles=1, length=4, cyclic_frequency=1, frequency=1, end=99)
    host = host_of(model, schedule=cycle)
    host.prune_every_k_steps = None
    assert updates_of(host, model, 6) == [1, 2, 3, 4]
    assert host.nonzeros == round(0.05 * host.theoretical_size)


@pytest.mark.parametrize(
    "schedule, steps",
    [(None, 0), (Constant(0.05, 5), -1), (OneShot(0.05, stop=4), 3), (None, float("inf")), (None, float("nan"))],
)
def test_steps_between_updates_that_cannot_be_are_refused(schedule, steps):
    host = host_of(network(), schedule=schedule, update_frequency=7)
    before = host.prune_every_k_steps
    with pytest.raises(UsageError, match="at least 1 step|own update steps|a whole number of steps"):
        host.prune_every_k_steps = steps
    assert host.prune_every_k_steps == before


def test_the_default_growth_rule_tells_an_engine_why_it_is_dense(caplog):
    model = network()
    host = Masking(torch.optim.SGD(model.parameters(), 0.1))  # ITOP's default: momentum
    host.add_module(model, density=0.05)
    Engine(host, (3, 16, 16))
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "growth_mode='momentum'" in record.getMessage() and "choose growth_mode 'gradient'" in record.getMessage()
