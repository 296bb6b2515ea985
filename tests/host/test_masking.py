"""The host: exact counts for every rule, zeros where inactive, and the faults seen in the published hosts."""

import copy
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from east_plugins import Masking, UsageError, growth, pruning, redistribution
from east_plugins.host.optimizer_state import state_tensors
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import on_path
from east_plugins.plugins.density import Constant, Cyclic, Gradual

GROWTH, PRUNING, REDISTRIBUTION = growth.names(), pruning.names(), ["none", *redistribution.names()]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


class Net(nn.Module):
    """Two convolutions, a tied third, a norm and a head; uneven sizes."""

    def __init__(self, tied=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        if tied:
            self.conv3.weight = self.conv2.weight

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv3(F.relu(self.conv2(x)))) + x
        return self.fc(x.mean((2, 3)))


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 6, 6, generator=draw), torch.randint(5, (4,), generator=draw)


def host_of(model, optimizer="sgd", density=0.1, sparse_init="ERK", **kwargs):
    kwargs = {"redistribution_mode": "none", "growth_mode": "gradient", "death_rate": 0.4, **kwargs}
    host = Masking(OPTIMIZERS[optimizer](model.parameters()), **kwargs)
    host.add_module(model, density=density, sparse_init=sparse_init)
    return host


def train(model, host, steps, first=0):
    for step in range(first, first + steps):
        x, y = batch(step)
        x = x.to(next(model.parameters()).dtype)
        host.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()
        yield host.steps


def check(host, model, total):
    """Books and tensors agree, the total is exact, every inactive weight and its state are exactly zero."""
    weights = maskable(model)
    assert sum(int(mask.sum()) for mask in host.masks.values()) == host.nonzeros == total
    for name, mask in host.masks.items():
        assert int(mask.sum()) == host.name2nonzeros[name] >= 1
        for tensor in (weights[name], *state_tensors(host.optimizer, weights[name])):
            assert (tensor[~mask] == 0).all()


@pytest.mark.parametrize("cyclic", [False, True], ids=["constant", "cyclic"])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("grow, prune", list(itertools.product(GROWTH, PRUNING)))
def test_counts_are_exact_after_every_update(grow, prune, tied, cyclic):
    model = Net(tied)
    schedule = Constant(0.1, 1, end=99)
    if cyclic:
        schedule = Cyclic(0.1, multiplier=4, cycles=2, length=8, cyclic_frequency=1, frequency=1, end=99)
    host = host_of(model, growth_mode=grow, death_mode=prune, schedule=schedule)
    final = round(0.1 * theoretical_size(model))
    for step in train(model, host, 20):
        check(host, model, round(final * schedule.density(step) / 0.1))
    assert host.nonzeros == final


@pytest.mark.parametrize("scope", ["local", "global", "all"])
@pytest.mark.parametrize("redistribute", REDISTRIBUTION)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_counts_are_exact_for_every_optimizer_redistribution_and_scope(optimizer, redistribute, scope):
    model = Net()
    schedule = Cyclic(0.05, multiplier=5, cycles=1, length=10, cyclic_frequency=1, frequency=1, end=99)
    host = host_of(
        model, optimizer, 0.05, schedule=schedule, redistribution_mode=redistribute, prune_scope=scope, death_rate=0.6
    )
    final = round(0.05 * theoretical_size(model))
    for step in train(model, host, 20):
        check(host, model, round(final * schedule.density(step) / 0.05))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["ERK", "ER", "uniform", "EPL", "EPF"]),
    st.floats(0.02, 1.0),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(GROWTH),
    st.sampled_from(PRUNING),
)
def test_counts_are_exact_for_any_density_rate_and_allocation(allocation, density, rate, tied, grow, prune):
    model = Net(tied)
    host = host_of(
        model, density=density, sparse_init=allocation, growth_mode=grow, death_mode=prune, death_rate=rate,
        update_frequency=1,
    )  # fmt: skip
    room = sum(w.numel() for w in maskable(model).values())
    for _ in train(model, host, 3):
        check(host, model, min(round(density * theoretical_size(model)), room))


def test_magnitude_prune_with_equal_magnitudes_drops_exactly_the_share():
    # ITOP compares with a threshold: of equal magnitudes it removed 2,053 weights in place of 206
    model = Net()
    host = host_of(model, density=0.5)
    with torch.no_grad():
        for name, weight in maskable(model).items():
            weight.copy_(host.masks[name] * 0.5)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    before = {name: mask.clone() for name, mask in host.masks.items()}
    host.truncate_weights()
    for name, mask in host.masks.items():
        changed = int((before[name] & ~mask).sum())
        assert changed <= int(0.4 * before[name].sum())
        assert mask.sum() == before[name].sum()


def test_zero_gradients_do_not_reselect_active_weights():
    # tied zero gradients re-select active entries in ITOP, so that the count drifts
    model = Net()
    host = host_of(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    total = host.nonzeros
    for _ in range(10):
        host.truncate_weights()
        check(host, model, total)


def test_momentum_neuron_does_not_drain_a_layer():
    # ITOP accepts the name, has no branch for it and grows nothing: 558 to 41 weights in four updates
    model = Net()
    host = host_of(model, growth_mode="momentum_neuron", update_frequency=1)
    counts = dict(host.name2nonzeros)
    for _ in train(model, host, 6):
        assert host.name2nonzeros == counts


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_growth_by_momentum_finds_new_positions(optimizer):
    # ITOP zeroes the momentum of inactive weights and then grows by it: no new position ever
    model = Net()
    host = host_of(model, optimizer, growth_mode="momentum", update_frequency=2)
    before = copy.deepcopy(host.masks)
    for _ in train(model, host, 4):
        pass
    assert any((host.masks[name] & ~before[name]).any() for name in before)


def test_grown_weights_start_at_zero_with_no_state_of_their_past():
    # Adam's moments are never reset for regrown weights in the published hosts
    model = Net()
    host = host_of(model, "adam", schedule=Constant(0.1, 5, end=6))
    for _ in train(model, host, 4):
        pass
    before = copy.deepcopy(host.masks)
    for _ in train(model, host, 1, first=4):
        grown = {name: mask & ~before[name] for name, mask in host.masks.items()}
        assert any(new.any() for new in grown.values())
        for name, new in grown.items():
            for tensor in (host.weights[name], *state_tensors(host.optimizer, host.weights[name])):
                assert (tensor[new] == 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.05, 0.5], ids=["gather", "fill"])
def test_active_weights_move_as_with_dense_masking(optimizer, density):
    """Masking gradients first gives bit for bit what masking weights and state after the step gives."""
    ours, theirs = Net().double(), Net().double()
    theirs.load_state_dict(ours.state_dict())
    host = host_of(ours, optimizer, density, update_frequency=None)
    reference, weights = OPTIMIZERS[optimizer](theirs.parameters()), maskable(theirs)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(host.masks[name])
    for step, _ in enumerate(train(ours, host, 6)):
        x, y = batch(step)
        reference.zero_grad()
        F.cross_entropy(theirs(x.double()), y).backward()
        reference.step()
        with torch.no_grad():
            for name, weight in weights.items():
                for tensor in (weight, *state_tensors(reference, weight)):
                    tensor.mul_(host.masks[name])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masks_and_parameters_are_never_rebound():
    # ITOP replaces both at every update, so that references go stale
    model = Net()
    host = host_of(model, update_frequency=1)
    masks, weights = dict(host.masks), dict(model.named_parameters())
    pointers = {name: (masks[name].data_ptr(), weights[name].data_ptr()) for name in masks}
    for _ in train(model, host, 3):
        pass
    assert all(host.masks[n] is masks[n] and host.masks[n].dtype == torch.bool for n in masks)
    assert {n: (host.masks[n].data_ptr(), model.get_parameter(n).data_ptr()) for n in masks} == pointers


def test_norms_and_biases_are_not_masked():
    # the published hosts mask LayerNorm weights
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    assert set(host_of(model, density=0.3).masks) == {"0.weight", "2.weight"}


def test_a_resumed_run_goes_on_exactly(tmp_path):
    # masks are in no checkpoint of the published hosts
    def build():
        torch.manual_seed(7)
        model = Net()
        return model, host_of(model, "adam", growth_mode="momentum", update_frequency=3, seed=1)

    model, host = build()
    for _ in train(model, host, 7):
        pass
    torch.save([model.state_dict(), host.optimizer.state_dict(), host.state_dict()], tmp_path / "all.pt")
    for _ in train(model, host, 7, first=7):
        pass
    other, resumed = build()
    states = torch.load(tmp_path / "all.pt", weights_only=True)
    for target, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        target.load_state_dict(state)
    for _ in train(other, resumed, 7, first=7):
        pass
    assert resumed.steps == host.steps == 14
    for name in host.masks:
        assert torch.equal(host.masks[name], resumed.masks[name])
        assert torch.equal(host.fired_masks[name], resumed.fired_masks[name])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masks_of_another_model_are_refused():
    host = host_of(Net())
    state = host.state_dict()
    state["masks"].pop("fc.weight")
    with pytest.raises(UsageError, match=r"fc\.weight"):
        host.load_state_dict(state)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(growth_mode="gradeint"), "did you mean gradient"),
        (dict(death_mode="magnitud"), "did you mean magnitude"),
        (dict(redistribution_mode="momentun"), "did you mean momentum"),
        (dict(sparse_init="ERq"), "did you mean"),
        (dict(death_rate=1.5), "`death_rate`"),
        (dict(prune_scope="galactic"), "`prune_scope`"),
        (dict(growth_death_ratio=0.5), "growth_death_ratio"),
        (dict(density=0), "`density`"),
        (dict(density=float("nan")), "`density`"),
        (dict(sparse_init="connected"), "input_shape"),
        (dict(density=0.001), "`density` gives"),
    ],
)
def test_wrong_options_are_refused_in_one_line(kwargs, words):
    # unknown growth only prints, unknown death is an UnboundLocalError, unknown init trains an all-zero network
    with pytest.raises(UsageError, match=words) as error:
        host_of(Net(), **kwargs)
    assert "\n" not in str(error.value)


def test_unknown_optimizers_are_refused_by_name():
    model = Net()
    with pytest.raises(UsageError, match="Adadelta.*SGD, Adam, AdamW"):
        Masking(torch.optim.Adadelta(model.parameters()))


def test_a_second_module_is_refused():
    # names clash across modules in the published hosts
    host = host_of(Net())
    with pytest.raises(UsageError, match="ModuleDict"):
        host.add_module(Net(), density=0.1)


def test_truncate_weights_after_step_is_refused_for_gradient_growth():
    model = Net()
    host = host_of(model, update_frequency=None)
    for _ in train(model, host, 1):
        pass
    with pytest.raises(UsageError, match="masked by step"):
        host.truncate_weights()


def test_step_takes_a_closure_and_returns_the_loss():
    # a wrapped optimizer.step loses both in rigl-torch
    model = Net()
    host = host_of(model)
    x, y = batch()

    def closure():
        host.optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert host.step(closure).item() > 0
    check(host, model, round(0.1 * theoretical_size(model)))


def test_gradient_scaler_unscales_before_growth():
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    hosts = [host_of(m, update_frequency=1, seed=3) for m in (model, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    hosts[0].step(scaler=scaler)
    F.cross_entropy(plain(x), y).backward()
    hosts[1].step()
    for name in hosts[0].masks:
        assert torch.equal(hosts[0].masks[name], hosts[1].masks[name])


def test_itop_rate_counts_every_weight_ever_active():
    model = Net()
    host = host_of(model, growth_mode="random_unfired", update_frequency=1)
    ever = {name: mask.clone() for name, mask in host.masks.items()}
    for _ in train(model, host, 5):
        for name, mask in host.masks.items():
            ever[name] |= mask
    shares, rate = host.fired_masks_update()
    assert shares == pytest.approx({name: mask.double().mean().item() for name, mask in ever.items()})
    assert rate == sum(int(m.sum()) for m in ever.values()) / sum(m.numel() for m in ever.values()) > 0.2


def test_random_unfired_prefers_weights_never_active():
    model = Net()
    host = host_of(model, growth_mode="random_unfired", update_frequency=1, density=0.05)
    for _ in range(3):
        fired = {name: mask.clone() for name, mask in host.fired_masks.items()}
        before = {name: mask.clone() for name, mask in host.masks.items()}
        for _ in train(model, host, 1):
            pass
        assert not any((m & ~before[n] & fired[n]).any() for n, m in host.masks.items())


def test_threshold_prune_leaves_large_weights():
    model = Net()
    host = host_of(model, death_mode="threshold", threshold=0.05, update_frequency=1, density=0.3)
    large = {name: host.masks[name] & (w.abs() > 0.1) for name, w in maskable(model).items()}
    for _ in train(model, host, 1):
        pass
    assert all(host.masks[name][keep].all() for name, keep in large.items())


def test_set_prune_takes_both_signs():
    # ITOP's SET death removed 1,046 weights where 206 were asked, sparse_learning's 1,950
    model = nn.Linear(40, 40)
    host = host_of(model, death_mode="SET", growth_mode="random", density=0.5, death_rate=0.25)
    weight, mask = model.weight.detach().clone(), host.masks["weight"].clone()
    host.truncate_weights()
    gone = mask & ~host.masks["weight"]
    assert host.num_remove["weight"] == int(gone.sum()) <= 200
    positive, negative = weight[gone & (weight > 0)], weight[gone & (weight < 0)]
    assert len(positive) and len(negative)
    assert positive.max() <= weight[mask & (weight > 0)].sort().values[100]
    assert negative.min() >= weight[mask & (weight < 0)].sort(descending=True).values[100]


def test_static_training_never_changes_the_mask():
    model = Net()
    host = host_of(model, args=SimpleNamespace(fix=True, update_frequency=1))
    before = copy.deepcopy(host.masks)
    for _ in train(model, host, 5):
        pass
    assert all(torch.equal(before[name], host.masks[name]) for name in before)


def test_gradual_pruning_ends_on_target():
    model = Net()
    host = host_of(model, schedule=Gradual(0.1, initial=0.5, stop=9, frequency=2, end=20))
    for _ in train(model, host, 12):
        pass
    check(host, model, round(0.1 * theoretical_size(model)))


def test_rules_of_the_old_signature_work_and_stay_exact():
    def old_growth(masking, name, new_mask, total_regrowth, weight):
        scores = masking.get_gradient_for_weights(weight).abs() * (new_mask == 0)
        new_mask.view(-1)[scores.flatten().topk(total_regrowth + 5).indices] = 1  # five too many
        return new_mask

    def old_prune(masking, mask, weight, name):
        return weight.abs() > weight[mask].abs().median()

    def old_redistribution(masking, name, weight, mask):
        return weight[mask].abs().mean().item()

    model = Net()
    host = host_of(
        model, growth_mode=old_growth, death_mode=old_prune, redistribution_mode=old_redistribution, update_frequency=1
    )
    for _ in train(model, host, 5):
        check(host, model, round(0.1 * theoretical_size(model)))


def test_removed_weights_train_densely():
    model = Net()
    host = host_of(model)
    host.remove_weight("fc")
    host.remove_weight_partial_name("conv1")
    assert set(host.masks) == {"conv2.weight", "conv3.weight"}
    host.remove_type(nn.Conv2d)
    assert not host.masks
    with pytest.raises(UsageError, match="nowhere"):
        host.remove_weight("nowhere")


def test_library_is_quiet_unless_asked(capsys, caplog):
    model = Net()
    with caplog.at_level(logging.INFO):
        host = host_of(model, update_frequency=1)
        for _ in train(model, host, 2):
            pass
    assert capsys.readouterr() == ("", "")
    assert "conv1.weight: " in caplog.text


def test_building_a_host_draws_nothing_from_the_global_generator():
    model = Net()
    state = torch.get_rng_state()
    host_of(model, growth_mode="random", update_frequency=1).truncate_weights()
    assert torch.equal(state, torch.get_rng_state())
    masks = [host_of(Net(), seed=seed).masks["conv2.weight"] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_channels_last_weights():
    model = Net().to(memory_format=torch.channels_last)
    host = host_of(model, update_frequency=1)
    for _ in train(model, host, 3):
        check(host, model, round(0.1 * theoretical_size(model)))


def test_compiled_model_keeps_plain_names():
    model = Net()
    assert set(host_of(torch.compile(model)).masks) == set(host_of(model).masks)


def test_kept_connected_weights_stay_on_paths():
    model = Net()
    host = Masking(OPTIMIZERS["sgd"](model.parameters()), 0.5, growth_mode="gradient", update_frequency=1,
                   redistribution_mode="none", keep_connected=True)  # fmt: skip
    host.add_module(model, density=0.02, sparse_init="connected", input_shape=(3, 6, 6))
    for _ in train(model, host, 12):
        check(host, model, round(0.02 * theoretical_size(model)))
        assert all(torch.equal(on, host.masks[name]) for name, on in on_path(model, host.masks, (3, 6, 6)).items())
