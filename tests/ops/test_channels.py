"""Which channels layers read and write, on networks where the answer is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins.ops.channels import trace
from east_plugins.ops.maskable import maskable
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def wiring_of(model, input_shape):
    return trace(model, {name: weight.shape for name, weight in maskable(model).items()}, input_shape)


class Block(nn.Module):
    """Four named layers on `channels`, wired by a function."""

    def __init__(self, wire, channels=4, **layers):
        super().__init__()
        self.wire = wire
        for name in "abc":
            self.add_module(name, layers.get(name) or nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return self.wire(self, x)


def sides(model, input_shape):
    layers = wiring_of(model, input_shape).layers
    return {
        name.removesuffix(".weight"): (set(wires.sources.tolist()), set(wires.targets.tolist()))
        for name, wires in layers.items()
    }


def test_chain_through_norm_activation_and_pooling():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.MaxPool2d(2, padding=1),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.LogSoftmax(1),
    )
    wiring = wiring_of(model, (3, 16, 16))
    first, second, last = wiring.layers.values()
    assert torch.equal(wiring.inputs, first.sources) and torch.equal(first.targets, second.sources)
    assert torch.equal(second.targets, last.sources) and torch.equal(last.targets, wiring.outputs)
    assert wiring.size == 1 + 3 + 4 + 5 + 6


@pytest.mark.parametrize(
    "add", [lambda x, y: x + y, torch.add, lambda x, y: x.add_(y), lambda x, y: x.sub(y), lambda x, y: x * y]
)
def test_addition_couples_channel_with_channel(add):
    def wire(net, x):
        x = net.a(x)
        return net.c(add(x, net.b(x)))

    found = sides(Block(wire), (4, 8, 8))
    assert found["a"][1] == found["b"][0] == found["b"][1] == found["c"][0]
    assert len(found["b"][0]) == 4


def test_in_place_addition_is_seen_through_other_names():
    def wire(net, x):
        x = net.a(x)
        same = x
        x += net.b(x)
        return net.c(same)

    found = sides(Block(wire), (4, 8, 8))
    assert found["b"][1] == found["c"][0]


def test_padded_shortcut_couples_the_channels_that_it_has():
    def wire(net, x):
        x = net.a(x)
        return net.c(net.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4)))

    found = sides(Block(wire, b=nn.Conv2d(4, 8, 3, 2, 1), c=nn.Conv2d(8, 4, 1)), (4, 8, 8))
    assert found["a"][1] < found["b"][1] == found["c"][0] and len(found["b"][1]) == 8


def test_concatenation_and_flattening_keep_channels_apart():
    def wire(net, x):
        return net.c(torch.cat([net.a(x), net.b(x)], 1).flatten(1))

    model = Block(wire, c=nn.Linear(8 * 9, 2))
    wires = wiring_of(model, (4, 3, 3)).layers
    assert set(wires["a.weight"].targets.tolist()).isdisjoint(wires["b.weight"].targets.tolist())
    written = torch.cat([wires["a.weight"].targets, wires["b.weight"].targets])
    assert torch.equal(wires["c.weight"].source.flatten(), written.repeat_interleave(9))


@pytest.mark.parametrize("groups, outputs", [(4, 4), (4, 8), (2, 4)])
def test_grouped_convolution_reads_its_group_and_couples_one_channel_with_one(groups, outputs):
    wires = wiring_of(nn.Sequential(nn.Conv2d(4, outputs, 3, groups=groups)), (4, 8, 8)).layers["0.weight"]
    for o in range(outputs):
        assert wires.target[o] in wires.source[o]
    blocks = [set(row.tolist()) for row in wires.source]
    assert all(a == b or a.isdisjoint(b) for a in blocks for b in blocks)
    assert len(wires.sources) == len(wires.targets) == 4


def test_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv2d(4, 5, 3), nn.ConvTranspose2d(5, 5, 3, groups=5))
    up, conv, depthwise = wiring_of(model, (3, 8, 8)).layers.values()
    assert torch.equal(up.target.flatten(), conv.source.flatten()) and up.source.shape == (3, 1)
    assert torch.equal(depthwise.source, conv.target) and torch.equal(depthwise.target, depthwise.source)


def test_gate_of_every_channel_couples_and_gate_of_all_does_not():
    def wire(net, x):
        x = net.a(x)
        return x * torch.sigmoid(net.b(x.mean((2, 3), keepdim=True))) * torch.sigmoid(net.c(x))

    found = sides(Block(wire, b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 1, 1)), (4, 8, 8))
    assert found["a"][1] == found["b"][1] == found["b"][0]
    assert found["c"][1].isdisjoint(found["a"][1])


def test_channels_last_in_line():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))
    first, second = wiring_of(model, (4,)).layers.values()
    assert torch.equal(first.targets, second.sources)

    def wire(net, x):
        x = net.a(x).flatten(2).transpose(1, 2)  # [batch, position, channel]
        return net.c(x + net.b(x))

    found = sides(Block(wire, b=nn.Linear(4, 4), c=nn.Linear(4, 2)), (4, 3, 5))
    assert found["a"][1] == found["b"][0] == found["b"][1] == found["c"][0]


def test_scalars_and_parameters_change_no_channel():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.scale, self.gamma = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            x = self.gamma * F.conv2d((x - 0.5) / 0.25, self.conv.weight * self.scale) + 1
            return self.fc(F.interpolate(x, scale_factor=2, mode="bilinear").amax((2, 3)))

    first, second = wiring_of(Scaled(), (3, 8, 8)).layers.values()
    assert len(first.targets) == 4 and torch.equal(first.targets, second.sources)


def test_unknown_operations_give_number_0():
    for mix in (lambda x: torch.fft.rfft(x, dim=1).real, lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(4, 3))):
        model = Block(lambda net, x, mix=mix: net.b(mix(net.a(x))), b=nn.Conv2d(3, 4, 1), c=nn.Identity())
        assert sides(model, (4, 8, 8))["b"][0] == set()


def test_layer_used_twice_has_one_set_of_channels():
    found = sides(Block(lambda net, x: net.c(net.b(net.b(net.a(x))))), (4, 8, 8))
    assert found["a"][1] == found["b"][0] == found["b"][1] == found["c"][0]


def test_stages_of_a_residual_network_with_and_without_sharing():
    model = models.build("resnet20", 10, width=4)
    plain = wiring_of(model, (3, 16, 16))
    share(model)
    shared = wiring_of(model, (3, 16, 16))
    for wiring, stage in ((plain, (4, 8, 16)), (shared, (4, 8, 16))):
        streams = [wiring.layers[f"layer{i}.0.conv2.weight"].targets for i in (1, 2, 3)]
        assert tuple(map(len, streams)) == stage
        for i, stream in enumerate(streams, start=1):
            assert torch.equal(wiring.layers[f"layer{i}.1.conv1.weight"].sources, stream)
            assert torch.equal(wiring.layers[f"layer{i}.1.conv2.weight"].targets, stream)
    assert set(shared.layers) < set(plain.layers) and shared.size < plain.size
