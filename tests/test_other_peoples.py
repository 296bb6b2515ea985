"""The host in code that its authors never saw: other networks, optimizers, loops.

Right means: weights as those of a dense network that is masked after every step (float64, 20 steps, two updates),
exact counts, the same parameter objects; or one line that says what was met.
"""

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from east_plugins import Masking, UsageError
from east_plugins.plugins.density import Gradual

STEPS, EVERY = 20, 7  # two updates, and steps after each

SGD = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)


class Net(nn.Module):
    """Convolutions, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def batch(step):
    draw = torch.Generator().manual_seed(1000 + step)
    return torch.randn(6, 3, 6, 6, generator=draw).double(), torch.randint(5, (6,), generator=draw)


def built(model=None):
    torch.manual_seed(3)
    return (model or Net)().double()


def host_of(model, optimizer=None, density=0.2, growth_mode="gradient", add=None, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), **SGD)
    host = Masking(optimizer, growth_mode=growth_mode, death_rate=0.4, **{"update_frequency": EVERY, "seed": 0, **kwargs})
    host.add_module(model, density=density, **(add or {}))
    return host


def backward(model, step, loss=None):
    x, y = batch(step)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y) if loss is None else loss(model, x, y)
    loss.backward()


def state_of(optimizer, weight):
    return [v for v in optimizer.state.get(weight, {}).values() if torch.is_tensor(v) and v.shape == weight.shape]


def masked_(model, optimizers, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            for tensor in (weight, *(each for o in optimizers for each in state_of(o, weight))):
                tensor.mul_(mask)


def clones(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def check(host, model, total=None):
    """Books are exact and nothing is nonzero outside of the masks."""
    assert sum(int(mask.sum()) for mask in host.masks.values()) == host.nonzeros
    assert total is None or host.nonzeros == total
    for name, mask in host.masks.items():
        weight = model.get_parameter(name)
        assert host.weights[name] is weight and not weight[~mask].any(), name
        for tensor in state_of(host.optimizer, weight):
            assert not tensor[~mask].any(), name


def assert_same(model, reference, tolerance=1e-9):
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= tolerance, name


class Reference:
    """The same network trained densely, masked after every step by the masks of a host."""

    def __init__(self, model, host, optimizer=None):
        self.model = copy.deepcopy(model)
        self.optimizers = [(optimizer or (lambda p: torch.optim.SGD(p, **SGD)))(self.model.parameters())]
        self.host, self.masks = host, clones(host.masks)

    def step(self, step, loss=None, before=None):
        """To be called after the host's: takes its masks over."""
        backward(self.model, step, loss)
        if before is not None:
            before(self)
        for optimizer in self.optimizers:
            optimizer.step()
        self.follow()

    def follow(self):
        for masks in (self.masks, self.host.masks):
            masked_(self.model, self.optimizers, masks)
        self.masks = clones(self.host.masks)


# ---------------------------------------------------------------------- weights that somebody else writes


def by_load_state_dict(model, dense):
    model.load_state_dict(dense)


def by_copy(model, dense):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[name])


def by_new_data(model, dense):
    for name, parameter in model.named_parameters():
        parameter.data = dense[name].clone()


def by_copy_into_data(model, dense):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[name])


def by_numpy(model, dense):
    for name, parameter in model.named_parameters():
        parameter.detach().numpy()[...] = dense[name].numpy()


def by_one_layer(model, dense):
    with torch.no_grad():
        model.conv2.weight.lerp_(dense["conv2.weight"], 0.3)


WRITERS = [by_load_state_dict, by_copy, by_new_data, by_copy_into_data, by_numpy, by_one_layer]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("at", [3, EVERY], ids=["between updates", "after an update"])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("write", WRITERS)
def test_weights_that_somebody_writes_are_masked_at_the_next_step(write, optimizer, density, at):
    model = built()
    dense = {name: torch.randn_like(value) * 0.1 if value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    host = host_of(model, OPTIMIZERS[optimizer](model.parameters()), density)
    total, reference = host.nonzeros, Reference(model, host, OPTIMIZERS[optimizer])
    for step in range(STEPS):
        if step == at:
            write(model, dense)
            write(reference.model, dense)
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model, total)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_averaged_weights_may_be_swapped_in_and_out(density):
    """As EMA implementations do around an evaluation: the average has weights where masks once were."""
    model = built()
    host = host_of(model, density=density)
    reference, average = Reference(model, host), copy.deepcopy(model)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step)
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
        if step % 3 == 0:
            kept = [p.detach().clone() for p in model.parameters()]
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                p.data.copy_(a.data)
            model(batch(0)[0])
            reference.model(batch(0)[0])
            for k, p in zip(kept, model.parameters(), strict=True):
                p.data.copy_(k)
        check(host, model)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dense_optimizer_state_may_be_loaded(optimizer, density):
    model = built()
    make = OPTIMIZERS[optimizer]
    other = make(model.parameters())
    for step in range(3):
        backward(model, step)
        other.step()
    state = copy.deepcopy(other.state_dict())
    host = host_of(model, make(model.parameters()), density)
    reference = Reference(model, host, make)
    for step in range(STEPS):
        if step == 4:
            host.optimizer.load_state_dict(copy.deepcopy(state))
            reference.optimizers[0].load_state_dict(copy.deepcopy(state))
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_masks_that_a_script_writes_hold_from_the_next_step_on(density):
    model = built()
    host = host_of(model, density=density, update_frequency=None)
    reference = Reference(model, host)
    for step in range(8):
        if step == 3:  # as ITOP's scripts do
            host.masks["conv2.weight"][:] = torch.rand(12, 12, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.1
            host.masks["fc.weight"] = (torch.arange(60).view(5, 12) % 3 == 0).float()
            reference.masks = clones(host.masks)
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)
    assert host.name2nonzeros["fc.weight"] == 20


# ---------------------------------------------------------------------- steps that are not the host's


def framework_step(host, model, step):
    backward(model, step)
    host.optimizer.step()


def framework_closure(host, model, step):
    def closure():
        backward(model, step)
        return torch.tensor(0.0)

    host.optimizer.step(closure)


def framework_scaler(host, model, step):
    backward(model, step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(host.optimizer)
    scaler.update()


def framework_scheduled(host, model, step):
    """A learning-rate scheduler wraps the optimizer's step."""
    if step == 0:
        host.scheduler = torch.optim.lr_scheduler.LambdaLR(host.optimizer, lambda _: 1.0)
    backward(model, step)
    host.optimizer.step()
    host.scheduler.step()


def framework_by_turns(host, model, step):
    backward(model, step)
    host.step() if step % 2 else host.optimizer.step()


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
@pytest.mark.parametrize(
    "step_of", [framework_step, framework_closure, framework_scaler, framework_scheduled, framework_by_turns]
)
def test_a_framework_that_steps_the_optimizer_steps_the_host(step_of, growth, density):
    models = [built(), built()]
    hosts = [host_of(model, density=density, growth_mode=growth) for model in models]
    reference = Reference(models[0], hosts[0])
    first = clones(hosts[0].masks)
    for step in range(STEPS):
        step_of(hosts[0], models[0], step)
        backward(models[1], step)
        hosts[1].step()
        reference.step(step)
        check(hosts[0], models[0], hosts[1].nonzeros)
        assert_same(models[0], reference.model)
        assert_same(*models)
        assert all(torch.equal(mask, hosts[1].masks[name]) for name, mask in hosts[0].masks.items())
    assert hosts[0].steps == STEPS and any(not torch.equal(first[name], mask) for name, mask in hosts[0].masks.items())


@pytest.mark.parametrize("order", ["optimizer first", "host first"])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_both_steps_for_the_same_gradients_are_refused(order, density):
    model = built()
    host = host_of(model, density=density)
    calls = [host.optimizer.step, host.step]
    backward(model, 0)
    first, second = calls if order == "optimizer first" else calls[::-1]
    first()
    with pytest.raises(UsageError, match="call one of them"):
        second()
    check(host, model)


def test_a_warm_up_by_the_optimizer_is_no_second_step():
    model = built()
    host = host_of(model)
    for step in range(4):
        backward(model, step)
        host.optimizer.step() if step < 2 else host.step()
    check(host, model)


def muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01)


SECOND = {
    "adam of the head": lambda model: torch.optim.Adam(model.fc.parameters(), lr=0.01),
    "muon of the matrices": muon,
    "adagrad of the second convolution": lambda model: torch.optim.Adagrad([model.conv2.weight], lr=0.01),
}


@pytest.mark.parametrize("host_first", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("second", SECOND)
def test_weights_in_a_second_optimizer_are_masked_after_its_steps(second, density, host_first):
    model = built()
    other = SECOND[second](model)
    mine = {id(p) for group in other.param_groups for p in group["params"]}
    first = torch.optim.SGD([p for p in model.parameters() if id(p) not in mine], **SGD)
    host = host_of(model, first, density)
    reference = Reference(model, host)
    other_reference = SECOND[second](reference.model)
    mine = {id(p) for group in other_reference.param_groups for p in group["params"]}
    pair = [torch.optim.SGD([p for p in reference.model.parameters() if id(p) not in mine], **SGD), other_reference]
    reference.optimizers = pair
    for step in range(STEPS):
        backward(model, step)
        backward(reference.model, step)
        for turn in ("host", "other") if host_first else ("other", "host"):
            if turn == "host":
                host.step()
                pair[0].step()
            else:
                other.step()
                pair[1].step()
            reference.follow()
            check(host, model)
            assert not any(state[~host.masks[n]].any() for n, w in host.weights.items() for state in state_of(other, w))
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize(
    "new", [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.02), OPTIMIZERS["sgd"]],
    ids=["adamw", "sgd", "another of the same"],
)  # fmt: skip
def test_another_optimizer_may_be_set(new, density):
    model = built()
    host = host_of(model, density=density)
    reference = Reference(model, host)
    for step in range(STEPS):
        if step == 9:
            host.optimizer = new(model.parameters())
            reference.optimizers = [new(reference.model.parameters())]
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)


def test_the_optimizer_of_another_model_cannot_be_set():
    model = built()
    host = host_of(model)
    before = host.optimizer
    with pytest.raises(UsageError, match="another model"):
        host.optimizer = torch.optim.SGD(built().parameters(), 0.1)
    assert host.optimizer is before


# ---------------------------------------------------------------------- weights that are not trained


def probe(model):
    """A linear probe: the head alone is trained."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)


def one_layer(model):
    model.conv1.weight.requires_grad_(False)


def all_but_norms_and_second(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "conv2" in name)


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
@pytest.mark.parametrize("freeze", [probe, one_layer, all_but_norms_and_second])
def test_frozen_weights_are_left_as_they_are(freeze, growth):
    model = built()
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    host = host_of(model, growth_mode=growth)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    matrices = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    assert set(host.masks) == matrices
    size = sum(model.get_parameter(name).numel() for name in matrices)
    assert host.theoretical_size == size
    reference = Reference(model, host)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model, round(0.2 * size))
        assert_same(model, reference.model)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in frozen)


def test_a_frozen_torchvision_backbone_is_left_as_it_is():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.requires_grad_(False)
    model.fc = nn.Linear(512, 10)
    before = copy.deepcopy(model.state_dict())
    model.eval()  # a linear probe
    host = host_of(model, torch.optim.AdamW(model.fc.parameters(), 1e-3), density=0.1, update_frequency=2)
    for step in range(4):
        model.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.tensor([1, 7])).backward()
        host.step()
    check(host, model, 512)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "fc" not in name)


def test_weights_unfrozen_later_are_told_of_once(caplog):
    model = built()
    one_layer(model)
    host = host_of(model)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            if step == 2:
                model.conv1.weight.requires_grad_(True)
            backward(model, step)
            host.step()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "conv1.weight" in message and "stay dense" in message


@pytest.mark.parametrize("rule", ["gradient", "momentum", "random"])
@pytest.mark.parametrize("frozen_later", [False, True])
def test_layers_that_get_no_gradient_stay(rule, frozen_later):
    model = built()
    model.unused = nn.Linear(8, 8).double()
    host = host_of(model, growth_mode=rule)
    if frozen_later:
        model.conv1.requires_grad_(False)
    before = clones(host.masks)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        check(host, model)
    still = {"unused.weight", *(["conv1.weight"] if frozen_later else [])}
    if rule != "random" or frozen_later:
        names = still if rule != "random" else still - {"unused.weight"}
        assert all(torch.equal(before[name], host.masks[name]) for name in names)
    assert not torch.equal(before["conv2.weight"], host.masks["conv2.weight"])


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("fc", {"fc.weight"}),
        ("fc.weight", {"fc.weight"}),
        (["conv*"], {"conv1.weight", "conv2.weight"}),
        (lambda m: m.conv1, {"conv1.weight"}),
        (lambda m: [m.conv2, "fc"], {"conv2.weight", "fc.weight"}),
        (nn.Linear, {"fc.weight"}),
        ([nn.Linear, "*1.weight"], {"fc.weight", "conv1.weight"}),
    ],
)
def test_what_is_excluded_is_left_dense(exclude, left):
    model = built()
    before = copy.deepcopy(model.state_dict())
    kind = isinstance(exclude, type) or not callable(exclude)
    host = host_of(model, add={"exclude": exclude if kind else exclude(model)})
    assert set(host.masks) == {"conv1.weight", "conv2.weight", "fc.weight"} - left
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in left)
    size = sum(weight.numel() for weight in host.weights.values())
    assert host.theoretical_size == size and host.nonzeros == round(0.2 * size)


def test_an_exclude_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match="matches no module.*did you mean conv1"):
        host_of(built(), add={"exclude": "conv11"})
