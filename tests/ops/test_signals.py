"""Gradient flow, positive pre-activations and mask similarity against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.measure.similarity import jaccard
from east_plugins.ops.signals import gradient_norms, positive_preactivations
from east_plugins.training import models


def sparse_network():
    torch.manual_seed(0)
    model = models.build("resnet20", 10, image_size=8, width=8).double()
    host = Masking(torch.optim.SGD(model.parameters()), growth_mode="random")
    host.add_module(model, density=0.3)
    return model, host.masks, torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 10


def test_gradient_norms_are_those_of_active_weights_and_nothing_changes():
    model, masks, x, y = sparse_network()
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_norms(model, masks, x, y)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    F.cross_entropy(model.train()(x), y).backward()
    for name, weight in model.named_parameters():
        if name in masks:
            assert found[name] == pytest.approx(float(weight.grad[masks[name]].norm()), rel=1e-12)
    assert found.keys() == masks.keys()


class Calls(nn.Module):
    """ReLUs of all kinds."""

    def __init__(self):
        super().__init__()
        self.act, self.weight = nn.ReLU(inplace=True), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.relu(F.relu(self.act(x - 1) - 1) - 1).relu_()


def test_positive_preactivations_of_every_call():
    x = torch.arange(8.0).view(2, 4)
    model = Calls()
    assert positive_preactivations(model, x) == [6 / 8, 5 / 8, 4 / 8, 4 / 8]
    assert model.training and positive_preactivations(nn.Linear(4, 2), x) == []


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_jaccard_is_intersection_over_union(pairs):
    a, b = ({"w": torch.tensor(column)} for column in zip(*pairs, strict=True))
    sets = [{i for i, pair in enumerate(pairs) if pair[k]} for k in (0, 1)]
    union = sets[0] | sets[1]
    assert jaccard(a, b) == jaccard(b, a) == (len(sets[0] & sets[1]) / len(union) if union else 1.0)


def test_masks_of_other_networks_are_refused():
    with pytest.raises(UsageError, match="different networks"):
        jaccard({"w": torch.ones(3, dtype=torch.bool)}, {"w": torch.ones(4, dtype=torch.bool)})
