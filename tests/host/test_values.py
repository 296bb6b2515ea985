"""Initial values scaled by the active fan-in."""

import pytest
import torch
from torch import nn

from east_plugins.host.values import sparse_fan_in
from east_plugins.ops.maskable import maskable
from east_plugins.plugins.allocation.layerwise import random_mask
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def test_standard_deviation_follows_each_neurons_own_fan_in():
    weight = torch.zeros(3, 50, 20, 20)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[0, :, ::2] = mask[1, ::5] = mask[2] = True
    sparse_fan_in({"w": weight}, {"w": mask}, torch.Generator().manual_seed(0))
    for row, active in zip(weight, mask, strict=True):
        values = row[active]
        assert values.std().item() == pytest.approx((2 / len(values)) ** 0.5, rel=0.05)
        assert abs(values.mean().item()) < 0.1 * values.std().item()
    assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()


def test_changes_masked_weights_in_place_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    masks = {"0.weight": random_mask((4, 3, 3, 3), 12, torch.Generator().manual_seed(0))}
    state = torch.get_rng_state()
    sparse_fan_in(maskable(model), masks, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and parameter.requires_grad
        assert torch.equal(parameter, before[name][1]) == (name != "0.weight")
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_values_for_the_same_seed(dtype):
    mask = random_mask((20, 30), 100, torch.Generator().manual_seed(1))

    def values(seed):
        weight = torch.ones(20, 30, dtype=dtype)
        sparse_fan_in({"w": weight}, {"w": mask}, torch.Generator().manual_seed(seed))
        return weight

    assert torch.equal(values(3), values(3)) and not torch.equal(values(3), values(4))
    assert values(3).dtype == dtype


def test_shared_weights_are_drawn_once():
    model = models.build("resnet20", 10, width=4)
    share(model)
    weights = maskable(model)
    generator = torch.Generator().manual_seed(0)
    masks = {name: random_mask(weight.shape, 5, generator) for name, weight in weights.items()}
    sparse_fan_in(weights, masks, torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(0)
    torch.randn(5 * len(masks), generator=drawn, dtype=torch.float64)
    once = torch.Generator().manual_seed(0)
    sparse_fan_in(weights, masks, once)
    assert len(masks) < 22 and torch.equal(once.get_state(), drawn.get_state())
    assert model.layer1[2].conv1.weight is model.layer1[1].conv1.weight


def test_neurons_without_active_weights_stay_zero():
    weight = torch.randn(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    sparse_fan_in({"w": weight}, {"w": mask}, torch.Generator())
    assert (weight[1] == 0).all() and weight.isfinite().all()
