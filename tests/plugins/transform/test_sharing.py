import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins.errors import NothingMatchedError, UsageError
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.plugins import registry
from east_plugins.plugins.activation import attach, factory
from east_plugins.plugins.transform.sharing import share, unshare
from east_plugins.training import models


class Basic(nn.Module):
    """A residual block in the manner of the DST scripts; `shortcut` is empty, or a convolution and a norm."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Projected(Basic):
    """A block whose shortcut is always a convolution."""

    def __init__(self, channels, width, stride=1):
        super().__init__(channels, width, stride)
        self.shortcut = nn.Conv2d(channels, width, 1, stride)


class Pooled(nn.Sequential):
    """Blocks in one flat list, as in GraNet's ResNet-20."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


def flat(*plan, block=Basic):
    """A flat list of blocks, each given by (channels, width, stride)."""
    return Pooled(*(block(*arguments) for arguments in plan))


def net():
    return flat((4, 4), (4, 4), (4, 4), (4, 8, 2), (8, 8), (8, 8), (8, 8))


EXPECTED = {f"blocks.{b}.conv{c}": f"blocks.{a}.conv{c}" for a, b in [(1, 2), (4, 5), (4, 6)] for c in (1, 2)}
X = torch.randn(2, 4, 8, 8)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def tied(model):
    modules = dict(model.named_modules())
    return all(modules[b].weight is modules[a].weight and modules[b].scale.shape == () for b, a in EXPECTED.items())


# ---------------------------------------------------------------- which blocks


@pytest.mark.parametrize(
    "name, classes, pairs, count",
    [
        ("resnet34", 100, 16, 11_227_572),
        ("resnet50", 10, 24, 13_981_282),
    ],
)
def test_numbers_of_the_paper(name, classes, pairs, count):
    with torch.device("meta"):
        model = models.build(name, classes)
        size = theoretical_size(model)
        assert len(share(model)) == pairs
    assert parameters(model) == count
    assert theoretical_size(model) == size
    assert not any(name.endswith("scale") for name in maskable(model))


def test_42_and_54_mib_with_sharing_and_dyrelu():
    model = models.build("resnet34", 100)
    share(model)
    assert round(parameters(model) * 4 / 2**20, 2) == 42.83
    attach(model, factory("b"), (3, 8, 8))
    assert round(parameters(model) * 4 / 2**20, 2) == 54.96


def test_stages_in_a_flat_list_are_told_apart():
    assert share(net()) == EXPECTED


def test_a_stage_that_keeps_the_width_starts_where_the_structure_changes():
    model = flat((4, 4), (4, 4), (4, 4), (4, 4, 2), (4, 4), (4, 4))
    assert {b[7]: a[7] for b, a in share(model).items()} == {"2": "1", "5": "4"}


@pytest.mark.parametrize(
    "change",
    [
        dict(stride=2),
        dict(padding=0),
        dict(dilation=2),
        dict(groups=4),
        dict(kernel_size=5),
        dict(padding_mode="circular"),
    ],
    ids=str,
)
def test_blocks_that_differ_are_not_tied(change):
    model = flat((4, 4), (4, 4), (4, 4))
    arguments = dict(kernel_size=3, padding=1, bias=False)
    model.blocks[2].conv1 = nn.Conv2d(4, 4, **(arguments | change))
    with pytest.raises(NothingMatchedError, match="`east_share`"):
        share(model)
    model.blocks[2].conv1 = nn.Conv2d(4, 4, **arguments)
    assert len(share(model)) == 2


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_containers(container):
    blocks = [Basic(4, 4) for _ in range(4)]
    model = nn.ModuleDict({"stage": container(*blocks) if container is nn.Sequential else container(blocks)})
    assert {(b[6], a[6]) for b, a in share(model).items()} == {("2", "1"), ("3", "1")}


def test_the_first_block_lends_where_asked():
    model = flat((4, 4), (4, 4), (4, 4))
    assert set(share(model, start=1).values()) == {"blocks.0.conv1", "blocks.0.conv2"}


def test_shortcuts_norms_biases_and_linear_layers_stay_their_own():
    model = flat((4, 4), (4, 4), (4, 4), block=Projected)
    assert set(share(model)) == {"blocks.2.conv1", "blocks.2.conv2"}
    assert model.blocks[2].shortcut.weight is not model.blocks[1].shortcut.weight
    assert model.blocks[2].conv2.bias is not model.blocks[1].conv2.bias


def test_convolutions_that_compute_otherwise_are_left_alone():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), padding=1)

    model = flat((4, 4), (4, 4), (4, 4))
    for block in model.blocks:
        block.conv1 = Standardized(4, 4, 3)
    assert set(share(model)) == {"blocks.2.conv2"}


def test_activations_of_a_plugin_are_no_blocks():
    model = flat((4, 4), (4, 8, 2), (8, 8))
    attach(model, factory("c"), (4, 8, 8))
    with pytest.raises(NothingMatchedError):
        share(model)


@pytest.mark.parametrize(
    "model",
    [
        models.build("vgg16", 10, width=4),
        models.build("resnet18", 10, width=4),
        models.build("mlp", 10),
    ],
    ids=["vgg16", "resnet18", "mlp"],
)
def test_nothing_to_share_is_refused(model):
    with pytest.raises(NothingMatchedError, match="^`east_share` needs a stage .* the model has none$"):
        share(model)


def test_sharing_twice_and_a_start_below_one_are_refused():
    model = net()
    with pytest.raises(UsageError, match="`start` must be at least 1, got 0"):
        share(model, start=0)
    share(model)
    with pytest.raises(UsageError, match="already"):
        share(model)


def test_dct_layers_are_refused_with_the_reason():
    model = net()
    model.blocks[0].conv1.dct = nn.Identity()
    with pytest.raises(UsageError, match="conflicts with the DCT matrices"):
        share(model)
    assert parameters(model) == parameters(net()) and not hasattr(model.blocks[2].conv1, "scale")


# ---------------------------------------------------------------- what is computed


def test_a_borrowed_convolution_is_scale_times_the_lent_weight():
    model = net().double()
    share(model)
    conv, lent = model.blocks[2].conv2, model.blocks[1].conv2
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, lent.weight, conv.bias, padding=1), rtol=0, atol=0)
    with torch.no_grad():
        conv.scale.fill_(-0.3)
    torch.testing.assert_close(conv(x), F.conv2d(x, -0.3 * lent.weight, conv.bias, padding=1))


def test_gradients_of_all_blocks_are_summed_in_the_lent_weight():
    model, plain = net(), net()
    share(model)
    copied = copy.deepcopy(model)
    unshare(copied)
    plain.load_state_dict(copied.state_dict())
    model(X).sum().backward()
    plain(X).sum().backward()
    grads = {name: p.grad for name, p in plain.named_parameters()}
    lent = grads["blocks.4.conv1.weight"] + grads["blocks.5.conv1.weight"] + grads["blocks.6.conv1.weight"]
    torch.testing.assert_close(model.blocks[4].conv1.weight.grad, lent)
    assert all(p.grad is not None for p in model.parameters())


def test_unsharing_keeps_the_function_and_leaves_plain_layers():
    model = net().eval()
    keys = list(model.state_dict())
    share(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.uniform_(0.5, 2)
    expected = model(X)
    unshare(model)
    torch.testing.assert_close(model(X), expected)
    assert list(model.state_dict()) == keys and parameters(model) == parameters(net())
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize(
    "through",
    [
        copy.deepcopy,
        through_pickle,
        lambda m: m.to(torch.float64),
        lambda m: m.half().float(),
        lambda m: copy.deepcopy(copy.deepcopy(m)).eval(),
    ],
    ids=["deepcopy", "pickle", "to", "half", "twice"],
)
def test_ties_hold_through(through):
    model = net()
    share(model)
    model = through(model)
    assert tied(model)
    with torch.no_grad():
        model.blocks[1].conv1.weight.zero_()
    assert not model.blocks[2].conv1(X.to(model.blocks[0].conv2.bias.dtype)).any()


def test_ties_hold_through_a_state_dict():
    model, other = net(), net()
    share(model)
    share(other)
    state = model.state_dict()
    assert all(f"{name}.weight" in state and f"{name}.scale" in state for name in EXPECTED)
    other.load_state_dict(state)
    assert tied(other)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_a_deepcopy_computes_with_its_own_weights():
    model = net().eval()
    share(model)
    expected, other = model(X), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(X), expected)
    assert not other(X).any()


def test_an_optimizer_made_before_sees_the_right_parameters():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    share(model, optimizer=optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert "momentum_buffer" in optimizer.state[model.blocks[2].conv1.scale] and tied(model)


# ---------------------------------------------------------------- together


def test_with_phased_activations_in_either_order():
    outputs = []
    for order in ("share first", "activations first"):
        torch.manual_seed(0)
        model, generator = net().eval(), torch.Generator().manual_seed(1)
        if order == "share first":
            share(model)
        phased = attach(model, factory("b"), (4, 8, 8), generator=generator)
        if order == "activations first":
            assert share(model) == EXPECTED
        outputs.append(model(X))
        phased.remove()
        assert tied(model)
        outputs.append(model(X))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_found_by_name():
    assert registry.transform.get("share") is share
