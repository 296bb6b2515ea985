import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.sparse import Engine
from east_plugins.training import models

STEPS, EVERY, DENSITY = 24, 3, 0.2


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 3)
    ).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(7, 6, generator=generator, dtype=torch.float64), torch.arange(7) % 3


def hosted(model, optimizer=None, **settings):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    settings = {"density": DENSITY, "steps": STEPS, "update_frequency": EVERY, **settings}
    return Masking.of("topkast", model, optimizer, **settings), optimizer


def train(model, host, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()


def largest(values, count):
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.abs().flatten().topk(count).indices] = True
    return mask.view_as(values)


def test_training_is_that_of_a_direct_computation_with_dense_values():
    """The paper's algorithm, on a dense network: passes with A, updates of B, both chosen anew every few steps."""
    model = network()
    other = copy.deepcopy(model)
    host, optimizer = hosted(model)
    names = list(host.masks)
    total = {name: host.masks[name].sum().item() for name in names}
    assert sum(total.values()) == 2 * round(DENSITY * host.theoretical_size)
    inside = host.budgets
    assert sum(inside.values()) == round(DENSITY * host.theoretical_size)

    theta = {name: other.get_parameter(name).detach().clone() for name in names}
    dense = [p for n, p in other.named_parameters() if n not in names]
    momentum, plain = {name: torch.zeros_like(theta[name]) for name in names}, None
    for step in range(1, STEPS + 1):
        if step == 1 or (step - 1) % EVERY == 0:
            b = {name: largest(theta[name], total[name]) for name in names}
            a = {name: largest(theta[name], inside[name]) for name in names}
            momentum = {name: momentum[name] * b[name] for name in names}
        for name in names:
            assert torch.equal(host.masks[name], b[name])
            shown = model.get_parameter(name).detach()
            torch.testing.assert_close(shown, theta[name] * a[name], rtol=1e-9, atol=1e-12)
            other.get_parameter(name).data.copy_(theta[name] * a[name])
        x, y = batch(step)
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        for name in names:
            decay = 0.01 * theta[name] * (1 + (1 / DENSITY - 1) * ~a[name])
            grad = (other.get_parameter(name).grad + decay) * b[name]
            momentum[name] = 0.9 * momentum[name] + grad
            theta[name] = theta[name] - 0.05 * momentum[name]
        plain = plain or torch.optim.SGD(dense, 0.05, momentum=0.9, weight_decay=0.01)
        plain.step()
        train(model, host, optimizer, [step])
        if step == STEPS - 1:  # the run's last update but one step leaves A alone
            total = inside
            a = b = {name: largest(theta[name], inside[name]) for name in names}
            momentum = {name: momentum[name] * b[name] for name in names}
            assert all(torch.equal(host.masks[name], a[name]) for name in names)
            break
    assert host.nonzeros == round(DENSITY * host.theoretical_size)


def test_passes_see_the_forward_set_alone_and_the_sparse_engine_gives_the_same_losses():
    losses = {"dense": [], "sparse": []}
    for engine in losses:
        torch.manual_seed(0)
        model = models.build("resnet20", 10, 1, 8, 4).double()  # norms of constants blow rounding up
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        host = Masking.of("topkast", model, optimizer, density=0.04, steps=12, update_frequency=4)
        Engine(host, (1, 8, 8), engine)
        generator, final = torch.Generator().manual_seed(1), round(0.04 * host.theoretical_size)
        for step in range(1, 13):
            x, y = torch.randn(8, 1, 8, 8, generator=generator).double(), torch.arange(8)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            host.step()
            losses[engine].append(loss.item())
            assert sum(int((model.get_parameter(name) != 0).sum()) for name in host.masks) == final
            assert host.nonzeros == (2 * final if step < 11 else final)
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-6)


def test_equal_magnitudes_leave_exact_counts():
    model = network()
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    host, optimizer = hosted(model, torch.optim.SGD(model.parameters(), 0.0))
    train(model, host, optimizer, range(6))
    shown = {name: int((model.get_parameter(name) != 0).sum()) for name in host.masks}
    assert shown == host.budgets
    assert host.nonzeros == 2 * sum(host.budgets.values())


@pytest.mark.parametrize("stop", [7, 9])
def test_a_resumed_run_goes_on_bit_for_bit(stop):
    model = network()
    host, optimizer = hosted(model)
    train(model, host, optimizer, range(1, stop + 1))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), host.state_dict()))
    train(model, host, optimizer, range(stop + 1, 20))

    again = network()
    host2, optimizer2 = hosted(again)
    again.load_state_dict(state[0])
    optimizer2.load_state_dict(state[1])
    host2.load_state_dict(state[2])
    assert all(torch.equal(value, state[0][name]) for name, value in again.state_dict().items())
    train(again, host2, optimizer2, range(stop + 1, 20))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(host2.masks[name], host.masks[name]) for name in host.masks)


def test_decoupled_decay_is_stronger_outside_the_forward_set():
    """With AdamW and no gradient a step is decay alone: lr * decay inside, lr * decay / density outside."""
    model = network()
    initial = copy.deepcopy(model)
    host, _ = hosted(model, torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(EVERY - 1):
        inside = {name: model.get_parameter(name) != 0 for name in host.masks}
        host.step()
    host.plugins[-1].before(host)  # shows the weights as the next step finds them, after its own decay outside
    for name, mask in host.masks.items():
        start, now = initial.get_parameter(name).detach(), model.get_parameter(name).detach()
        at, more = mask & inside[name], 0.1 * 0.01 * (1 / DENSITY - 1)
        torch.testing.assert_close(now[at], start[at] * 0.999**2)
        out = mask & ~inside[name]
        torch.testing.assert_close(now[out], start[out] * 0.999**2 * (1 - more) ** 3)


def test_what_cannot_be_is_one_line():
    model = network()
    for settings, message in (
        ({"density_schedule_ratio": 0.5}, "`density_schedule_ratio` must be at least 1"),
        ({"companion_penalty": -1.0}, "`companion_penalty` must be at least 0"),
        ({"fix": True, "update_frequency": None}, "`fix` keeps the topology"),
    ):
        with pytest.raises(UsageError, match=message):
            hosted(model, **settings)
    with pytest.raises(UsageError, match="`east_cyclic` and `density_schedule` topkast both set the density"):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        Masking.of("topkast+cyclic", model, optimizer, density=0.1, steps=100)
