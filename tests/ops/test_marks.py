"""Modules of EAST's own are known by their type: attributes of a user's network mean nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins.export.graph import trace
from east_plugins.measure.costs import costs
from east_plugins.ops.marks import PluginModule, leave_out
from east_plugins.ops.maskable import layers, maskable
from east_plugins.ops.paths import effective_density
from east_plugins.plugins.activation import attach, factory
from east_plugins.plugins.transform.dct import convert
from east_plugins.plugins.transform.sharing import share


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.relu(self.conv(x) * self.scale)


class Named(nn.Module):
    """Attributes of every name that our modules have, with other meanings."""

    phase, dct, engine, east_plugin, east_dct, calls = 0.5, True, "diesel", True, True, 3

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block(), Block(), Block())
        self.fc = nn.Linear(4, 5)
        for module in self.modules():
            module.phase, module.engine, module.east_plugin, module.east_dct = 0.5, "diesel", True, True

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


SHAPE = (3, 6, 6)


def test_such_a_network_is_masked_measured_shared_and_exported():
    model = Named()
    assert len(maskable(model)) == 6
    assert share(model) == {f"blocks.{i}.conv": "blocks.1.conv" for i in (2, 3)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in maskable(model).items()}
    assert effective_density(model, masks, SHAPE) == sum(m.numel() for m in masks.values()) / (108 + 4 * 144 + 20)
    assert costs(model, SHAPE).dense_macs == costs(model, SHAPE).sparse_macs
    assert trace(model, {}, SHAPE).output_shape == (5,)
    assert model.phase == 0.5 and model.stem.engine == "diesel"


def test_such_a_network_takes_activations_and_dct_layers():
    model = Named()
    attach(model, factory("b"), SHAPE).remove()
    assert len(convert(model)) == 6
    assert trace(model, {}, SHAPE).output_shape == (5,)


def test_export_waits_for_the_end_of_a_phase():
    model = Named()
    phased = attach(model, factory("b"), SHAPE)
    with pytest.raises(Exception, match="phased out"):
        trace(model, {}, SHAPE)
    phased.set_beta(0)
    assert trace(model, {}, SHAPE).output_shape == (5,)


def test_what_is_left_out_is_no_layer_and_computes_as_before():
    model = Named()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    leave_out(model.stem)
    leave_out(model.stem)
    assert isinstance(model.stem, PluginModule) and isinstance(model.stem, nn.Conv2d)
    assert "stem" not in dict(layers(model)) and torch.equal(model(x), expected)
