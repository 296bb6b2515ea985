"""Channels that go: which ones, what goes with them, and that weights move over all layers to the exact count."""

import pytest
import torch
from torch import nn

from east_plugins import Masking, UsageError
from east_plugins.ops.channels import trace
from east_plugins.plugins.density import Constant
from east_plugins.plugins.protocols import Candidate, Layer, Moment
from east_plugins.plugins.structure.channels import Channels, removable
from east_plugins.training import models

SHAPE = (3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 10, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    )  # fmt: skip


def candidates(model, density, rate, seed):
    """Layers with random masks, weights, and gradients."""
    draw, found = torch.Generator().manual_seed(seed), []
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            mask = torch.rand(weight.shape, generator=draw) < density
            values, growth = (torch.randn(weight.shape, generator=draw) for _ in "ab")
            layer = Layer(name, values * mask, mask, mask.clone(), draw)
            found.append(
                Candidate(layer, int(mask.sum()), rate, lambda each: each.weight.abs(), lambda _, g=growth: g.abs())
            )
    return found


def expected(layers, gone, rate):
    """Masks after pruning and growing over all layers at once, in plain Python; `gone` are channels by layer."""
    (a, b, c), places, old = (each.layer for each in layers), [], []
    for layer, rows, columns in ((a, gone[0], ()), (b, gone[1], gone[0]), (c, (), gone[1])):
        allowed = torch.ones_like(layer.mask)
        allowed[list(rows)] = False
        allowed[:, list(columns)] = False
        places += [(layer.name, *at) for at in allowed.nonzero().tolist()]
        old += [(layer.name, *at) for at in layer.mask.nonzero().tolist()]
    value = {each.layer.name: each.importance for each in layers}
    score = {each.layer.name: each.growth for each in layers}
    total = len(old)
    left = sorted(set(old) & set(places), key=lambda at: -value[at[0]][tuple(at[1:])])[: total - int(rate * total)]
    idle = sorted(set(places) - set(left), key=lambda at: -score[at[0]][tuple(at[1:])])
    return {*left, *idle[: total - len(left)]}


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_update_is_that_of_a_direct_computation(seed, progress):
    model, rule = network(), Channels(remove=0.5, least=0.5, until=0.8)
    layers = candidates(model, 0.3, 0.4, seed)
    masks = rule.update(layers, Moment(torch.Generator(), progress, model, SHAPE))
    umm = [each.layer.weight.abs().flatten(1).mean(1) for each in layers[:2]]
    ranked = sorted((v.item(), i, c) for i, values in enumerate(umm) for c, v in enumerate(values))
    count, gone = round(0.5 * (1 - (1 - min(progress / 0.8, 1)) ** 3) * 16), [[], []]
    for _, layer, channel in ranked:
        if count and len(gone[layer]) < (6 - 1, 10 - 2)[layer]:  # a quarter of 6 and of 10 stays
            gone[layer].append(channel)
            count -= 1
    assert sum(map(len, gone)) == round(rule.share(progress) * 16) and rule.share(1.0) == 0.5
    found = {(each.layer.name, *at) for each, m in zip(layers, masks, strict=True) for at in m.nonzero().tolist()}
    assert found == expected(layers, gone, 0.4)


def test_of_equal_channels_and_weights_any_go_and_no_more():
    model, rule, seen = network(), Channels(remove=0.5, least=0.5), torch.zeros(10)
    for seed in range(30):
        layers = candidates(model, 0.3, 0.4, seed)
        for each in layers:
            each.layer.weight.copy_(each.layer.weight.abs().ceil().clamp(max=2.0) * each.layer.mask)
        layers[1].layer.weight.fill_(0.01)  # every channel of one layer alike, and the least of all
        masks = rule.update(layers, Moment(torch.Generator().manual_seed(seed), 1.0, model, SHAPE))
        gone = [~mask.flatten(1).any(1) for mask in masks[:2]]
        assert int(gone[1].sum()) == 8 and not masks[1][:, gone[0]].any() and not masks[2][:, gone[1]].any()
        assert sum(int(mask.sum()) for mask in masks) == sum(each.budget for each in layers)
        seen += gone[1]
    assert 10 < seen.min() and seen.max() < 30


def test_only_channels_that_one_layer_writes_can_go():
    model = models.build("resnet20", 10, 3, 8, 8)
    shapes = {name: weight.shape for name, weight in model.named_parameters() if weight.dim() > 1}
    own = removable(trace(model, shapes, SHAPE))
    inner = {f"layer{stage}.{block}.conv1.weight" for stage in (1, 2, 3) for block in range(3)}
    assert {name for name, numbers in own.items() if numbers} == inner
    assert all(len(own[name]) == len(model.get_parameter(name)) for name in inner)


@pytest.mark.parametrize("tied", [False, True])
def test_a_host_removes_half_of_the_channels_and_keeps_its_count(tied):
    model = models.build("resnet20", 10, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    name = "chase+share" if tied else "chase"
    host = Masking.of(name, model, optimizer, density=0.1, steps=40, update_frequency=4, input_shape=SHAPE)
    for _ in range(40):
        host.optimizer.zero_grad()
        model(torch.randn(4, *SHAPE)).square().mean().backward()
        host.step()
        assert host.nonzeros == host.target_nonzeros(1) == sum(int(mask.sum()) for mask in host.masks.values())
        assert min(host.name2nonzeros.values()) > 0
    first = [name for name in host.names if name.endswith("conv1.weight") and name != "conv1.weight"]
    silent = {name: host.masks[name].flatten(1).sum(1) == 0 for name in first}
    assert sum(int(each.sum()) for each in silent.values()) >= sum(len(each) for each in silent.values()) // 2
    for name, each in silent.items():
        assert len(each) - int(each.sum()) >= len(each) // 4
        unread = host.masks[name.replace("conv1", "conv2")].transpose(0, 1).flatten(1).sum(1) == 0
        assert int((each & unread).sum()) >= int(each.sum()) - 2  # but for those that lost their weights by themselves


def test_what_it_follows_must_be_there():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match="`structure` needs `input_shape`"):
        Masking.of("chase", model, optimizer, density=0.5, steps=40)
    with pytest.raises(UsageError, match="a density schedule with an `end`"):
        Masking(optimizer, structure="channels", schedule=Constant(0.5, 1)).add_module(
            model, density=0.5, input_shape=SHAPE
        )
    recurrent = nn.Sequential(nn.LSTM(4, 4))
    optimizer = torch.optim.SGD(recurrent.parameters(), 0.1)
    with pytest.raises(UsageError, match="`structure` follows convolutions and linear layers only"):
        Masking(optimizer, structure="channels", schedule=Constant(0.5, 1, 10)).add_module(
            recurrent, density=0.5, input_shape=(3, 4)
        )
    for bad in ({"remove": 1.0}, {"least": 0.0}, {"until": 0.0}):
        with pytest.raises(UsageError, match=f"`{next(iter(bad))}`"):
            Channels(**bad)
