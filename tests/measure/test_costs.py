import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from east_plugins import convert
from east_plugins.errors import UsageError
from east_plugins.measure.costs import costs
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.plugins.activation import factory, phased
from east_plugins.plugins.allocation.layerwise import budgets
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def erk(model, density):
    shapes = {name: weight.shape for name, weight in maskable(model).items()}
    return budgets("ERK", shapes, round(density * theoretical_size(model)))


# The paper's tables (EAST, Tables 2 and 5)


def test_resnet34_parameters():
    found = costs(models.build("resnet34", 100), (3, 32, 32))
    assert found.parameters == 21_328_292
    assert round(found.parameter_mib, 2) == round(found.stored_mib, 2) == 81.36
    assert found.maskable == found.nonzeros == 21_311_168
    assert found.dense_macs == found.sparse_macs


def test_resnet34_with_sharing_and_dyrelu():
    model = models.build("resnet34", 100)
    share(model)
    shared = costs(model, (3, 32, 32))
    assert round(shared.parameter_mib, 2) == 42.83
    assert shared.maskable == 21_311_168  # of the unshared network
    phased.attach(model, factory("dyrelu-b"), (3, 32, 32))
    both = costs(model, (3, 32, 32))
    assert round(both.parameter_mib, 2) == 54.96
    assert both.parameters - shared.parameters == 3_181_168
    assert (both.maskable, both.dense_macs) == (shared.maskable, shared.dense_macs)


def test_resnet50_dense_and_sparse():
    model = models.build("resnet50", 10)
    dense = costs(model, (3, 32, 32))
    assert dense.parameters == 23_520_842
    assert round(dense.dense_macs / 1e6, 2) == 1297.83
    found = [costs(model, (3, 32, 32), erk(model, density)) for density in (0.0005, 0.0001)]
    assert [c.nonzeros for c in found] == [11_734, 2_347]
    # with the 38.79 M of the fast transform these are DCTpS's 40.26 and 39.09 M
    assert [round(c.sparse_macs / 1e6, 2) for c in found] == [1.47, 0.29]


def test_resnet50_with_sharing():
    model = models.build("resnet50", 10)
    share(model)
    found = [costs(model, (3, 32, 32), erk(model, density)) for density in (0.0005, 0.0001)]
    assert round(found[0].parameters / 1e6, 2) == 13.98
    assert round(found[0].dense_macs / 1e6, 2) == 1297.83
    assert [round(c.sparse_macs / 1e6, 2) for c in found] == [2.59, 0.52]


# Counting


def test_macs_of_each_kind_of_layer():
    cases = [
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 8, 8), 4 * 6 * 9 * 16),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), 2 * 6 * 9 * 36),
        (nn.Conv1d(2, 3, 5), (2, 20), 2 * 3 * 5 * 16),
        (nn.Conv3d(1, 2, 3), (1, 5, 5, 5), 2 * 27 * 27),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(7, 5), (7,), 35),
        (nn.Linear(7, 5), (3, 7), 105),  # a linear layer at three positions
    ]
    for layer, shape, macs in cases:
        assert costs(layer, shape).dense_macs == macs
        assert costs(layer, shape, {"weight": 2}).sparse_macs == macs * 2 // layer.weight.numel()


class Twice(nn.Module):
    """A layer used twice, one with the same weight, and one that no inference uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def test_a_weight_is_stored_once_and_computed_with_at_every_use():
    found = costs(Twice(), (4,), {"a.weight": 5})
    assert found.parameters == 2 * 16 + 3 * 4
    assert found.maskable == 48
    assert found.nonzeros == 5 + 16
    assert (found.dense_macs, found.sparse_macs) == (3 * 16, 3 * 5)
    assert [(layer.name, layer.shape, layer.density) for layer in found.layers] == [
        ("a.weight", (4, 4), 5 / 16),
        ("unused.weight", (4, 4), 1.0),
    ]


def test_fixed_matrices_of_dct_layers_are_stored_and_their_fast_transform_computed():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 10))
    plain = costs(model, (2, 4, 4), {"0.weight": 3, "2.weight": 4})
    convert(model)
    found = costs(model, (2, 4, 4), {"0.weight": 3, "2.weight": 4})
    assert found.parameters == plain.parameters + 2  # an alpha each
    assert (found.stored_mib - plain.stored_mib) * 2**20 == 4 * (8 * 18 + 1280 + 2)
    transforms = 16 * 18 * math.log2(18) / 2 + 128 * math.log2(128) / 2
    assert found.sparse_macs == round(16 * 3 + 4 + transforms)
    assert found.dense_macs == plain.dense_macs


def test_frozen_parameters_are_stored_but_not_trained():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    model[0].requires_grad_(False)
    found = costs(model, (4,))
    assert found.parameters == 20
    assert (found.parameter_mib * 2**20, found.stored_mib * 2**20) == (40, 80)


def test_the_model_is_left_as_it_was():
    model = models.build("cnn", 10, in_channels=1, image_size=8)
    model.features[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    costs(model, (1, 8, 8))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_costs_are_json():
    found = asdict(costs(models.build("mlp", 10, in_channels=1, image_size=8), (1, 8, 8), {"fc1.weight": 192}))
    assert list(found) == [
        "parameters",
        "parameter_mib",
        "stored_mib",
        "maskable",
        "nonzeros",
        "dense_macs",
        "sparse_macs",
        "layers",
    ]
    assert found["layers"][0] == {"name": "fc1.weight", "shape": (300, 64), "density": 0.01}


def test_a_name_that_is_no_maskable_weight_is_refused():
    with pytest.raises(UsageError, match="nonzeros of bias"):
        costs(nn.Linear(3, 3), (3,), {"bias": 1})
