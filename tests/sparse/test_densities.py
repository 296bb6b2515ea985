"""Training at one to ten per cent with convolutions of every kind: the trajectory is the dense engine's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.sparse import Engine

KINDS = {
    "plain": (nn.Conv2d, dict(padding=1)),
    "grouped": (nn.Conv2d, dict(padding=1, groups=4)),
    "dilated": (nn.Conv2d, dict(padding=2, dilation=2)),
    "strided": (nn.Conv2d, dict(padding=1, stride=2)),
    "1-D": (nn.Conv1d, dict(padding=1)),
    "3-D": (nn.Conv3d, dict(padding=1)),
}
NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
SIZES = {nn.Conv1d: (16,), nn.Conv2d: (8, 8), nn.Conv3d: (4, 4, 4)}


class Net(nn.Module):
    """Two convolutions of a kind behind a plain one, the second with a way around it."""

    def __init__(self, kind):
        super().__init__()
        conv, options = KINDS[kind]
        norm, self.strided = NORMS[conv], options.get("stride", 1) > 1
        self.first, self.one = conv(4, 32, 3, padding=1, bias=False), norm(32)
        self.second, self.two = conv(32, 48, 3, bias=False, **options), norm(48)
        self.third, self.three = conv(48, 48, 3, bias=False, **options), norm(48)
        self.last = nn.Linear(48, 5)

    def forward(self, x):
        x = F.relu(self.two(self.second(F.relu(self.one(self.first(x))))))
        y = self.three(self.third(x))
        return self.last(F.relu(y if self.strided else y + x).flatten(2).mean(2))


def trained(kind, density, engine):
    torch.manual_seed(0)
    model, shape = Net(kind).double(), (4, *SIZES[KINDS[kind][0]])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.bias, std=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9, weight_decay=1e-3)
    host = Masking(optimizer, death_rate=0.5, growth_mode="gradient", update_frequency=20, seed=0, keep_connected=True)
    host.add_module(model, density=density, sparse_init="connected", input_shape=shape, weight_init="sparse-fan-in")
    engine, losses = Engine(host, shape, engine), []
    for _ in range(60):
        x, labels = torch.randn(20, *shape, dtype=torch.float64), torch.randint(5, (20,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        host.step()
        losses.append(loss.item())
    return model, host, engine, losses


@pytest.mark.parametrize(
    "density", [pytest.param(0.01, marks=pytest.mark.slow), 0.05, pytest.param(0.1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", [*list(KINDS)[:-1], pytest.param("3-D", marks=pytest.mark.slow)])
def test_60_steps_with_3_updates_are_those_of_the_dense_engine(kind, density):
    dense, host, _, expected = trained(kind, density, "dense")
    sparse, other, engine, losses = trained(kind, density, "sparse")
    assert not engine.dense and losses == pytest.approx(expected, abs=1e-9)
    assert all(torch.equal(other.masks[name], mask) for name, mask in host.masks.items())
    for (name, a), b in zip(sparse.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
