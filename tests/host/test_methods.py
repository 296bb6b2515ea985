"""The defining step of methods, beside a direct computation; every method with EAST's tricks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.plugins.rate import Elastic
from east_plugins.sparse import Engine
from east_plugins.training import models

SHAPE = (1, 8, 8)


def network(tied=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 4)).double()
    if tied:
        for parameter in model.parameters():
            parameter.data = parameter.data.sign() * 0.1 * (1 + (parameter.data.abs() > 0.1))
    return model


def data(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 8, generator=generator, dtype=torch.float64), torch.arange(12) % 4


def gradients(model, step=0):
    model.zero_grad()
    x, y = data(step)
    F.cross_entropy(model(x), y).backward()


def of(method, model, steps=100, lr=0.0, **settings):
    """A host whose optimizer leaves the weights as they are, so that an update can be computed beside it."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    return Masking.of(method, model, optimizer, steps=steps, density=0.25, **settings)


def is_one_of_the_highest(chosen, score, eligible):
    """Whether the chosen positions are a set with the highest scores among the eligible ones, whatever ties do."""
    assert (chosen <= eligible).all()
    left = eligible & ~chosen
    return not chosen.any() or not left.any() or score[chosen].min() >= score[left].max()


@pytest.mark.parametrize("tied", [False, True])
def test_mest_drops_the_lowest_of_weight_and_gradient_and_grows_at_random(tied):
    model = network(tied)
    host = of("mest", model, update_frequency=1, death_lam=0.5)
    before, weights = copy.deepcopy(dict(host.masks)), {n: w.detach().clone() for n, w in host.weights.items()}
    gradients(model)
    grads = {name: weight.grad.clone() for name, weight in host.weights.items()}
    host.step()
    for name, mask in host.masks.items():
        count = int(before[name].sum())
        assert int(mask.sum()) == count
        score = weights[name].abs() + 0.5 * grads[name].abs()
        gone, drops = before[name] & ~mask, int(0.2 * count)
        assert (score[gone] <= score[before[name]].sort().values[drops - 1]).all()
        assert (host.weights[name][mask & ~before[name]] == 0).all()
        assert 0 < int(gone.sum()) <= drops  # some of those that were dropped may be drawn again


def test_mests_mutation_is_elastic():
    rate = Elastic(0.2, 1600)
    assert [rate(step) for step in (0, 899, 900, 1199, 1200, 1600)] == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]
    host = of("mest", network(), steps=160)
    assert host.schedule.frequency == 5 and host.death_rate_decay == Elastic(0.2, 160)
    with pytest.raises(UsageError, match="`decay_schedule_half` and `decay_schedule_stop` must be shares"):
        of("mest", network(), decay_schedule_half=0.9)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_averaged_growth_takes_the_mean_gradient_of_the_last_batches(engine):
    model = network()
    host = of("rigl", model, lr=0.05, growth="averaged_gradient", growth_batches=3, update_frequency=5, death_rate=0.4)
    Engine(host, (8,), engine)
    means = {name: torch.zeros_like(weight) for name, weight in host.weights.items()}
    for step in range(1, 11):
        other = copy.deepcopy(model) if engine == "dense" else network()
        other.load_state_dict(model.state_dict())
        gradients(other, step)
        if step == 6:
            means = {name: torch.zeros_like(mean) for name, mean in means.items()}
        if step in (3, 4, 5, 8, 9, 10):
            for name in means:
                means[name] += other.get_parameter(name).grad / 3
        gradients(model, step)
        before = copy.deepcopy(dict(host.masks))
        host.step()
        for name, mask in host.masks.items():
            if step % 5:
                assert torch.equal(mask, before[name])
            else:
                grown, dropped = mask & ~before[name], before[name] & ~mask
                eligible = ~before[name] | dropped
                assert int(mask.sum()) == int(before[name].sum())
                assert is_one_of_the_highest(grown, means[name].abs(), eligible)
    assert all(int((~before[name]).sum()) for name in before)


def test_a_window_of_gradients_survives_a_checkpoint():
    def run(model, host, steps):
        for step in steps:
            gradients(model, step)
            host.step()

    settings = dict(lr=0.05, growth="averaged_gradient", growth_batches=4, update_frequency=6)
    model = network()
    host = of("rigl", model, **settings)
    run(model, host, range(4))
    state = copy.deepcopy([each.state_dict() for each in (model, host.optimizer, host)])
    run(model, host, range(4, 13))
    again = network()
    host2 = of("rigl", again, **settings)
    for each, saved in zip((again, host2.optimizer, host2), state, strict=True):
        each.load_state_dict(saved)
    run(again, host2, range(4, 13))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_copy_goes_on_alike_with_its_window_and_its_companion():
    for method, settings in (("rigl", dict(growth="averaged_gradient", growth_batches=4)), ("topkast", {})):
        model = network()
        host = of(method, model, lr=0.05, update_frequency=6, **settings)
        pair = [(model, host)]
        for step in range(13):
            if step == 4:
                pair.append(copy.deepcopy((model, host)))
            for each, its in pair:
                gradients(each, step)
                its.step()
        (model, host), (other, copied) = pair
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
        assert host.masks["2.weight"] is not copied.masks["2.weight"]


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])


def test_granet_prunes_over_all_layers_and_regenerates_as_much_as_it_drops():
    model = network()
    host = of("granet", model, steps=32, update_frequency=2)
    names, size = list(host.masks), host.theoretical_size
    assert host.nonzeros == 2 * round(0.25 * size)  # half of the weights
    for step in range(1, 31):
        before, weights = copy.deepcopy(dict(host.masks)), {n: w.detach().clone() for n, w in host.weights.items()}
        gradients(model, step)
        grads = {name: weight.grad.clone() for name, weight in host.weights.items()}
        host.step()
        if step % 2:
            continue
        left = max(0.0, 1 - step / 22) ** 3  # up to epoch 110 of 160
        total = round(round(0.25 * size) * (0.25 + (0.5 - 0.25) * left) / 0.25)
        assert host.nonzeros == total
        score = flat({name: weights[name].abs() * before[name] for name in names}, names)
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept[score.topk(min(total, int(flat(before, names).sum()))).indices] = True
        for name, base in zip(names, kept.split([weights[name].numel() for name in names]), strict=True):
            base = base.view_as(weights[name])
            count = int(base.sum())
            stays = count - int(host.death_rate * count)
            drops = torch.where(base, weights[name].abs(), torch.inf).flatten().topk(count - stays, largest=False)
            remaining = base.clone().flatten()
            remaining[drops.indices] = False
            remaining = remaining.view_as(base)
            grown = host.masks[name] & ~remaining
            assert int(host.masks[name].sum()) == count and (host.masks[name] >= remaining).all()
            assert is_one_of_the_highest(grown, grads[name].abs(), ~remaining)
        generator = torch.Generator().manual_seed(step)
        for name in names:  # as if they had been trained, so that the next update finds no zeros
            fresh = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
            host.weights[name].data.copy_(fresh * host.masks[name])


def test_gmp_prunes_every_layer_by_the_cubic_and_nothing_comes_back():
    model = network()
    host = of("gmp", model, steps=40, lr=0.05, update_frequency=4)
    size = host.theoretical_size
    assert host.nonzeros == size
    for step in range(1, 41):
        before = copy.deepcopy(dict(host.masks))
        gradients(model, step)
        host.step()
        density = 0.25 + 0.75 * max(0.0, 1 - (step - step % 4) / 20) ** 3
        assert host.nonzeros == (size if density == 1 else round(round(0.25 * size) * density / 0.25))
        for name, mask in host.masks.items():
            assert (mask <= before[name]).all()
            assert host.name2nonzeros[name] == pytest.approx(density * mask.numel(), abs=1)
            if step == 4:
                gone = before[name] & ~mask
                assert gone.any() and (host.weights[name][gone] == 0).all()
    assert host.nonzeros == round(0.25 * size)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mest+cyclic+share+dyrelu", {}),
        ("rigl+cyclic+share+dyrelu", {"growth": "averaged_gradient", "growth_batches": 2}),
        ("granet+share+dyrelu", {}),
        ("gmp+share+dyrelu", {}),
        ("topkast+share+dyrelu", {}),
        ("suptickets+share+dyrelu", {"density_schedule_share": 0.3}),
    ],
)
def test_twenty_updates_under_the_tricks_leave_exact_counts(method, settings):
    torch.manual_seed(0)
    model = models.build("resnet20", 10, 1, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    x, y = torch.randn(10, *SHAPE), torch.arange(10)
    if "cyclic" in method:
        settings = {**settings, "east_cyclic_multiplier": 3.0, "east_cyclic_update_frequency": 2}
    host = Masking.of(
        method,
        model,
        optimizer,
        density=0.1,
        steps=44,
        update_frequency=2,
        input_shape=SHAPE,
        batches=[(x, y)],
        **settings,
    )
    updates = 0
    for _ in range(44):
        due = host.schedule.due(host.steps + 1)
        updates += due
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()
        counted = sum(int(mask.sum()) for mask in host.masks.values())
        assert counted == host.nonzeros and (not due or counted == host.target_nonzeros(host.steps))
        assert all((weight[~host.masks[name]] == 0).all() for name, weight in host.weights.items())
    assert updates >= (16 if "tickets" in method else 20)
    assert host.nonzeros == round(0.1 * host.theoretical_size)


@pytest.mark.parametrize("method", ["granet", "gmp", "topkast", "suptickets"])
def test_methods_with_a_density_of_their_own_refuse_cycles(method):
    with pytest.raises(
        UsageError, match=f"`method` {method}\\+cyclic: `east_cyclic` and `density_schedule` .* both set"
    ):
        of(f"{method}+cyclic", network())


def test_a_torchvision_network_in_a_loop_of_ones_own():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
    host = Masking.of("mest", model, optimizer, density=0.05, steps=8, update_frequency=2)
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            host.step()
    assert host.nonzeros == round(0.05 * host.theoretical_size)


@pytest.mark.parametrize("method", ["granet", "gmp"])
def test_gradual_methods_with_equal_weights_keep_one_of_the_sets_of_the_highest(method):
    model = network(tied=True)
    host = of(method, model, steps=40, update_frequency=4, death_rate=0.0)
    for step in range(1, 25):
        before, weights = copy.deepcopy(dict(host.masks)), {n: w.detach().clone() for n, w in host.weights.items()}
        gradients(model, step)
        host.step()
        if step % 4:
            continue
        assert host.nonzeros == host.target_nonzeros(step)
        if method == "gmp":
            assert all(is_one_of_the_highest(host.masks[n], weights[n].abs(), before[n]) for n in before)
        else:
            names = list(before)
            assert is_one_of_the_highest(*(flat(each, names) for each in (host.masks, _sizes(weights), before)))


def _sizes(weights):
    return {name: weight.abs() for name, weight in weights.items()}


def test_averaged_growth_with_equal_gradients_draws_and_keeps_the_counts():
    model = network(tied=True)
    host = of("rigl", model, growth="averaged_gradient", growth_batches=2, update_frequency=3)
    counts, before = dict(host.name2nonzeros), copy.deepcopy(dict(host.masks))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        host.step()
    assert dict(host.name2nonzeros) == counts
    grown = host.masks["2.weight"] & ~before["2.weight"]
    assert int(grown.sum()) > 20 and grown.any(1).sum() > 15  # not the first neurons alone
