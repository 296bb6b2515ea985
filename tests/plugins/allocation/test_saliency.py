import copy

import pytest
import torch
from torch import nn

from east_plugins import Masking
from east_plugins.ops.maskable import maskable
from east_plugins.ops.paths import on_path
from east_plugins.plugins.allocation.saliency import SynFlow
from east_plugins.training import models


def draw(model, total, shape=(1, 8, 8)):
    names = list(maskable(model))
    budgets = {name: total // len(names) for name in names}
    return SynFlow()(model, budgets, shape, torch.Generator().manual_seed(0)), sum(budgets.values())


def test_counts_are_exact_and_every_layer_keeps_a_weight():
    model = models.build("resnet20", 10, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    masks, total = draw(model, 500)
    assert sum(int(mask.sum()) for mask in masks.values()) == total
    assert min(int(mask.sum()) for mask in masks.values()) >= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_layer_collapses_and_kept_weights_lie_on_paths():
    model = models.build("resnet20", 10, 1, 8, 8)
    masks, total = draw(model, 500)
    assert sum(int(on.sum()) for on in on_path(model, masks, (1, 8, 8)).values()) > 0.9 * total


def test_one_round_of_a_chain_by_hand():
    # R = sum over paths of products; the flow through each weight is the sum of the products of its paths
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0], [0.1, 0.2]]))
        model[2].weight.copy_(torch.tensor([[-2.0, 0.5]]))
    masks = SynFlow()(model, {"0.weight": 1, "2.weight": 1}, (2,), torch.Generator())
    assert masks["0.weight"].tolist() == [[True, False], [False, False]]
    assert masks["2.weight"].tolist() == [[True, False]]


def test_the_host_keeps_the_drawn_shares():
    model = models.build("cnn", 10, 1, 8, 4)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="random", death_rate=0.5)
    host.add_module(model, density=0.2, sparse_init="synflow", input_shape=(1, 8, 8))
    drawn = dict(host.name2nonzeros)
    host.truncate_weights()
    assert host.name2nonzeros == drawn
    assert host.nonzeros == round(0.2 * host.theoretical_size) == pytest.approx(sum(drawn.values()))
