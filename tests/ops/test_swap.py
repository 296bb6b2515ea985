import copy
import pickle

import pytest
import torch
from torch import nn

from east_plugins.ops.swap import Swapped, restore, swap


class Doubled(Swapped):
    def forward(self, *args):
        return 2 * super().forward(*args)


def test_a_swapped_module_keeps_its_identity_name_and_repr():
    layer = nn.Linear(2, 3)
    text, parameters = repr(layer), list(layer.parameters())
    swap(layer, Doubled)
    assert isinstance(layer, nn.Linear) and isinstance(layer, Doubled)
    assert repr(layer) == text and list(layer.parameters()) == parameters
    restore(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_swapped_and_independent(clone):
    layer, x = nn.Linear(2, 3), torch.ones(1, 2)
    plain = layer(x)
    swap(layer, Doubled)
    other = clone(layer)
    assert type(other) is type(layer) and torch.equal(other(x), 2 * plain)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    assert torch.equal(layer(x), 2 * plain) and not other(x).any()
    restore(other)
    assert type(other) is nn.Linear
