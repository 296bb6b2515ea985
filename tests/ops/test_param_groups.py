import pytest
import torch
from torch import nn

from east_plugins.errors import UsageError
from east_plugins.ops.param_groups import join, leave


def model():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": layer.named_parameters(), "lr": lr} for layer, lr in zip(net, (0.1, 0.2), strict=True)]
    return net, torch.optim.SGD(groups, momentum=0.9)


def test_new_parameters_join_the_group_of_the_models_first():
    net, optimizer = model()
    net[1].scale = nn.Parameter(torch.ones(()))
    for _ in range(2):
        join(optimizer, net, [net[1].scale, net[0].weight])
    first, second = optimizer.param_groups
    assert first["params"] == [net[0].weight, net[0].bias, net[1].scale]
    assert first["param_names"] == ["weight", "bias", "1.scale"]
    assert second["params"] == [net[1].weight, net[1].bias]


def test_parameters_leave_with_their_state():
    net, optimizer = model()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    leave(optimizer, net[0].parameters())
    leave(optimizer, net[0].parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], ["weight", "bias"]]
    assert set(optimizer.state) == set(net[1].parameters())
    optimizer.step()


def test_an_optimizer_of_other_parameters_is_refused():
    net, _ = model()
    _, optimizer = model()
    with pytest.raises(UsageError, match="no parameter of the model"):
        join(optimizer, net, [])
