import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.plugins.density import Tickets

STEPS = 40
SETTINGS = {"density_schedule_share": 0.3, "density_schedule_tickets": 2, "update_frequency": 4}
BOUNDS = [28, 34, 40]  # two cycles of six steps
DATA = [(torch.randn(9, 6, generator=torch.Generator().manual_seed(i)), torch.arange(9) % 3) for i in range(4)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


class Watcher:
    """Copies of the network, and the rates of the optimizer's steps."""

    def __init__(self):
        self.seen, self.rates, self.changed = {}, [], []

    def before(self, host):
        self.rates.append(host.optimizer.param_groups[0]["lr"])

    def __call__(self, host):
        self.seen[host.steps] = copy.deepcopy(host.modules[0].state_dict())
        self.changed.append(host.num_remove.get("0.weight"))


def hosted(model, batches=DATA, **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30])
    host = Masking.of("suptickets", model, optimizer, density=0.2, steps=STEPS, batches=batches, **SETTINGS, **settings)
    return host, optimizer, scheduler


def train(model, host, optimizer, scheduler, steps):
    for step in steps:
        x, y = DATA[step % len(DATA)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()
        scheduler.step()


def test_the_network_at_the_end_is_the_pruned_average_of_the_tickets():
    model = network()
    host, optimizer, scheduler = hosted(model)
    ours, watch = host.plugins[-1], Watcher()
    host.plugins = [watch, ours]
    train(model, host, optimizer, scheduler, range(STEPS))
    names = list(host.masks)
    total = round(0.2 * host.theoretical_size)
    average = watch.seen[BOUNDS[0]]
    for n, bound in enumerate(BOUNDS[1:], start=2):
        average = {k: average[k] * (1 - 1 / n) + watch.seen[bound][k] / n for k in average}
        flat = torch.cat([average[name].abs().flatten() for name in names])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(total).indices] = True
        masks = dict(zip(names, kept.split([average[name].numel() for name in names]), strict=True))
        average |= {name: average[name] * masks[name].view_as(average[name]) for name in names}
    assert host.nonzeros == total == sum(int((average[name] != 0).sum()) for name in names)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name])
    other = network()
    other.load_state_dict(average)
    torch.optim.swa_utils.update_bn(DATA, other)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(model[1].running_var, other[1].running_var)


def test_each_cycle_explores_once_and_has_a_learning_rate_of_its_own():
    model = network()
    host, optimizer, scheduler = hosted(model)
    ours, watch = host.plugins[-1], Watcher()
    host.plugins = [ours, watch]
    updates = []
    truncate = host.truncate_weights
    host.truncate_weights = lambda: (updates.append((host.steps, host._rate_now)), truncate())
    train(model, host, optimizer, scheduler, range(STEPS))
    assert [step for step, _ in updates] == [4, 8, 12, 16, 20, 24, 29, 35]
    assert [rate for _, rate in updates[-2:]] == [0.5, 0.5] and updates[5][1] < 0.2
    rates = watch.rates
    assert rates[:28] == pytest.approx([0.1] * 20 + [0.01] * 8)
    cycle = [0.1 * (0.01 + 0.04 * swing) for swing in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0)]
    assert rates[28:] == pytest.approx(cycle * 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)  # the schedule's own


def test_without_batches_the_statistics_are_the_averages():
    model = network()
    host, optimizer, scheduler = hosted(model, batches=None)
    watch = Watcher()
    host.plugins = [watch, *host.plugins]
    train(model, host, optimizer, scheduler, range(STEPS))
    expected = sum(watch.seen[bound]["1.running_mean"] for bound in BOUNDS) / 3
    torch.testing.assert_close(model[1].running_mean, expected)


def test_a_resumed_run_goes_on_bit_for_bit():
    model = network()
    host, optimizer, scheduler = hosted(model)
    train(model, host, optimizer, scheduler, range(31))
    state = copy.deepcopy([each.state_dict() for each in (model, optimizer, scheduler, host)])
    train(model, host, optimizer, scheduler, range(31, STEPS))
    again = network()
    host2, optimizer2, scheduler2 = hosted(again)
    for each, saved in zip((again, optimizer2, scheduler2, host2), state, strict=True):
        each.load_state_dict(saved)
    train(again, host2, optimizer2, scheduler2, range(31, STEPS))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_what_cannot_be_is_one_line():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match="`density_schedule_tickets` 3 in the last 0.1 of 20 steps"):
        Masking.of("suptickets", model, optimizer, density=0.2, steps=20)
    with pytest.raises(UsageError, match="`companion_low` must be over 0"):
        Masking.of("suptickets", model, optimizer, density=0.2, steps=100, companion_low=0.0)
    with pytest.raises(UsageError, match="`companion` suptickets needs `density_schedule` suptickets"):
        Masking.of("rigl", model, optimizer, density=0.2, steps=100, companion="suptickets")
    with pytest.raises(UsageError, match="`explore` must be in"):
        Tickets(0.1, explore=2.0, end=1000)
