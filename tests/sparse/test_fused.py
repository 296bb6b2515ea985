"""A convolution with what follows it as one node of autograd: the dense results, in whatever way the output is read."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from east_plugins import Engine, Masking
from east_plugins.training import models

SHAPE = (3, 8, 8)


class Block(nn.Module):
    """Two convolutions with norms beside an identity; `read` is what reads the first norm's output."""

    def __init__(self, read, between=nn.Identity):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12, momentum=None)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12, affine=False)
        self.between, self.read, self.fc = between(), read, nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.read(self, x, self.between(self.bn1(self.conv1(x)))).mean((2, 3)))


def residual(block, x, y):
    y = block.bn2(block.conv2(F.relu(y)))
    y += x
    return F.relu(y, inplace=True)


def twice(block, x, y):
    return y.relu() * y + torch.relu(x + y)


def convolution_twice(block, x, y):
    z = block.conv2(y)
    return F.relu(block.bn2(z)) + z


def operators(block, x, y):
    y = 2 * y - 1 / (3 + y.sigmoid()) + torch.cat([y[:, :6], y[:, 6:]], 1)
    z = block.bn2(block.conv2(y))
    z *= 2
    return (-z).abs() + x


def in_place(block, x, y):
    z = F.relu_(y)
    return z + y + F.leaky_relu(block.bn2(block.conv2(x + 1)), 0.1)


def unlike(block, x, y):
    """What is added is of another shape."""
    return F.relu(y + x.mean((2, 3), keepdim=True)) + F.relu(1 + block.bn2(x + y))


def without_gradient(block, x, y):
    with torch.no_grad():
        z = block.bn2(block.conv2(x))
    return F.relu(y + z)


def recomputed(block, x, y):
    return checkpoint(lambda y: residual(block, x, y), torch.relu(y), use_reentrant=False)


READERS = [residual, twice, convolution_twice, operators, in_place, unlike, without_gradient, recomputed]


def trained(engine, build, steps=6):
    torch.manual_seed(0)
    model = build().double()
    host = Masking(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), growth_mode="gradient", update_frequency=4)
    host.add_module(model, density=0.3)
    engine, losses = Engine(host, SHAPE, engine), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(9, *SHAPE, generator=generator, dtype=torch.float64)
        host.optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(9) % 5)
        loss.backward()
        host.step()
        losses.append(loss.item())
    return model, engine, losses


def assert_as_dense(build, steps=6):
    dense, _, expected = trained("dense", build, steps)
    model, engine, losses = trained("sparse", build, steps)
    assert not engine.dense and losses == pytest.approx(expected, abs=1e-10)
    for (name, ours), theirs in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_weights_and_running_statistics_are_the_dense_ones_however_a_norm_is_read(read, caplog):
    caplog.set_level(logging.INFO)
    assert_as_dense(lambda: Block(read))
    assert "all channels" not in caplog.text and "cannot run" not in caplog.text


class Demanding(nn.Module):
    """Takes tensors alone."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("a tensor, please")
        return x


def test_a_network_that_wants_tensors_gets_them(caplog):
    caplog.set_level(logging.INFO)
    assert_as_dense(lambda: Block(residual, Demanding))
    assert "a tensor, please" in caplog.text and "all channels" not in caplog.text


def test_hooks_of_others_see_tensors_and_gradients_at_every_module():
    seen = {}
    for engine in ("dense", "sparse"):
        model, _, _ = trained(engine, lambda: models.build("resnet20", 5, image_size=8, width=4), steps=1)
        found = seen[engine] = []

        def note(module, _, tensors, found=found):
            found.append((module.weight.shape, type(tensors[0] if isinstance(tensors, tuple) else tensors)))

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_hook(note)
                module.register_full_backward_hook(note)
        x = torch.randn(9, *SHAPE, dtype=torch.float64).requires_grad_()
        F.cross_entropy(model(x), torch.arange(9) % 5).backward()
    assert sorted(seen["sparse"], key=str) == sorted(seen["dense"], key=str)
    assert {kind for _, kind in seen["sparse"]} == {torch.Tensor}


def test_gradients_asked_for_by_autograd_grad():
    grads = []
    for engine in ("dense", "sparse"):
        model, _, _ = trained(engine, lambda: Block(residual), steps=1)
        x = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
        wanted = [x, model.conv1.weight, model.bn1.weight, model.stem.bias]
        mask = (model.conv1.weight != 0).to(x.dtype)
        loss = F.cross_entropy(model(x), torch.arange(9) % 5)
        found = torch.autograd.grad(loss, wanted)
        grads.append([found[0], found[1] * mask, *found[2:]])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_node_gives_the_numbers_of_several_bit_for_bit(dtype):
    """So that runs repeat, whether somebody's hooks are there or not."""
    found = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = models.build("resnet20", 5, image_size=8, width=8).to(dtype)
        host = Masking(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), update_frequency=4, seed=0)
        host.add_module(model, density=0.1)
        Engine(host, SHAPE, "sparse")
        if hooked:
            model.layer1.register_forward_hook(lambda *_: None)
        for step in range(6):
            x = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(step), dtype=dtype)
            host.optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(16) % 5).backward()
            host.step()
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
