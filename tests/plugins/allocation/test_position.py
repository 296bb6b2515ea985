"""Allocations by position: places from the wiring, whatever the layers' names; exact budgets, connected masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import on_path
from east_plugins.plugins.allocation.layerwise import budgets
from east_plugins.plugins.allocation.position import places
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def placed(model, shape=(3, 32, 32)):
    found = places(model, {name: weight.shape for name, weight in maskable(model).items()}, shape)
    return {name.removesuffix(".weight"): place for name, place in found.items()}


def blocks(model, shape=(3, 32, 32)):
    return {name: place.block for name, place in placed(model, shape).items()}


def test_blocks_of_a_resnet_are_numbered_within_their_stage():
    for name, block in blocks(models.build("resnet34", 10)).items():
        if name in ("conv1", "fc") or (not name.startswith("layer1") and name.split(".")[1] == "0"):
            assert block == 0  # stem, head, and what opens a stage: on no loop
        else:
            assert block == int(name.split(".")[1]) + 1


def test_bottlenecks_open_the_first_stage_as_well():
    found = blocks(models.build("resnet50", 10))
    assert {block for name, block in found.items() if ".0." in name} == {0}
    assert found["layer3.5.conv2"] == 6


def test_a_shared_weight_stands_in_the_block_that_lends_it():
    model = models.build("resnet34", 10)
    share(model)
    assert set(blocks(model).values()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["vgg16", "cnn", "mlp", "lenet5"])
def test_networks_without_residual_blocks_have_none(name):
    assert set(blocks(models.build(name, 10)).values()) == {0}


def test_depthwise_layers_stand_in_the_block_around_them():
    found = blocks(models.build("torchvision:mobilenet_v2", 10, image_size=64), (3, 64, 64))
    assert found["features.1.conv.0.0"] == found["features.2.conv.1.0"] == 0
    assert [found[f"features.{i}.conv.1.0"] for i in (8, 9, 10)] == [1, 2, 3]


def test_a_gate_is_no_later_block():
    found = blocks(models.build("torchvision:mobilenet_v3_small", 10, image_size=64), (3, 64, 64))
    assert found["features.1.block.1.fc1"] == 1 and found["features.1.block.0.0"] == 0


def test_the_networks_own_channels_are_known():
    found = placed(models.build("resnet18", 10))
    assert [name for name, place in found.items() if place.reads_input] == ["conv1"]
    assert [name for name, place in found.items() if place.writes_output] == ["fc"]


class Residual(nn.Module):
    """Blocks of random depth on one stream, with names that say nothing, made in reverse."""

    def __init__(self, depths, opened):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.side = nn.Conv2d(3, 6, 1) if opened else None
        convs = [[nn.Conv2d(6, 6, 3, padding=1) for _ in range(depth)] for depth in depths]
        self.all = nn.ModuleList([conv for block in convs for conv in block])
        self.convs = convs
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x) + (0 if self.side is None else self.side(x))
        for block in self.convs:
            y = x
            for conv in block:
                y = conv(y).relu()
            x = x + y
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_every_loop_is_one_block(depths, opened):
    found = [place.block for name, place in placed(Residual(depths, opened), (3, 6, 6)).items() if "all" in name]
    expected = [i + 1 + opened for i, depth in enumerate(depths) for _ in range(depth)]
    assert found == expected


NETWORKS = [
    ("resnet34", 32, 1e-4),
    ("resnet50", 32, 1e-4),
    ("vgg16", 32, 1e-3),
    ("cnn", 32, 1e-2),
    ("torchvision:resnet18", 64, 1e-3),
    ("torchvision:mobilenet_v2", 64, 1e-2),
]


@pytest.mark.parametrize("name, size, density", NETWORKS)
@pytest.mark.parametrize("base", ["first-blocks", "EPL"])
def test_connected_masks_keep_the_budgets_and_lie_on_paths(name, size, density, base):
    model = models.build(name, 10, image_size=size)
    options = {"allocation": dict(budgets=base, width=0.6)}
    host = Masking(torch.optim.SGD(model.parameters(), lr=0.1), growth_mode="random", seed=0, options=options)
    host.add_module(model, density, "connected", input_shape=(3, size, size))
    assert host.nonzeros == round(density * theoretical_size(model))
    on = on_path(model, host.masks, (3, size, size))
    assert sum(int(mask.sum()) for mask in on.values()) >= 0.999 * host.nonzeros


@settings(max_examples=30, deadline=None)
@given(st.integers(37, 3_000_000))
def test_first_blocks_gives_exact_budgets_at_every_total(total):
    shapes = {name: weight.shape for name, weight in maskable(RESNET).items()}
    counts = budgets("first-blocks", shapes, total, PLACES)
    assert sum(counts.values()) == total and min(counts.values()) >= 1
    if 10_000 > total > 500:
        assert counts["layer2.3.conv1.weight"] < counts["layer2.0.conv1.weight"] / 20


RESNET = models.build("resnet34", 10)
PLACES = places(RESNET, {name: weight.shape for name, weight in maskable(RESNET).items()}, (3, 16, 16))


def hosted(sparse_init="connected", **options):
    torch.manual_seed(0)
    model = models.build("resnet20", 10)
    host = Masking(
        torch.optim.SGD(model.parameters(), lr=0.1), growth_mode="random", seed=0, update_frequency=1,
        options={"allocation": options},
    )  # fmt: skip
    host.add_module(model, 0.005, sparse_init, input_shape=(3, 16, 16))
    return host


def test_updates_keep_the_budgets_of_an_allocation_by_position():
    host = hosted(budgets="first-blocks")
    before = dict(host.name2nonzeros)
    host.truncate_weights()
    assert host.name2nonzeros == before


def test_a_resumed_host_keeps_the_budgets_too():
    host, other = hosted(budgets="first-blocks"), hosted(budgets="EPL")
    other.load_state_dict(host.state_dict())
    other.truncate_weights()
    assert other.name2nonzeros == host.name2nonzeros


def test_width_sets_how_many_channels_are_in_use():
    def used(width):
        return int(hosted(budgets="EPL", width=width).masks["layer2.1.conv1.weight"].flatten(1).any(1).sum())

    assert used(0.3) < used(0.5) < used(0.7)


@pytest.mark.parametrize(
    "sparse_init, options, said",
    [
        ("connected", dict(width=1.5), "`width` must be in"),
        ("connected", dict(budgets="synflow"), "`budgets` synflow draws"),
        ("ERK", dict(width=0.5), "ERK has no option"),
        ("synflow", dict(budgets="EPL"), "synflow has no option"),
    ],
)
def test_options_that_cannot_be_are_refused(sparse_init, options, said):
    with pytest.raises(UsageError, match=said):
        hosted(sparse_init, **options)


def test_positions_need_an_input_shape():
    model = models.build("resnet20", 10)
    host = Masking(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="input_shape"):
        host.add_module(model, 0.01, "first-blocks")
