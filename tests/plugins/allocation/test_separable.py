"""Separable masks: exact counts, every weight on a path, kernels and pairs of channels in turn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from east_plugins.errors import UsageError
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import on_path
from east_plugins.plugins.allocation.separable import separable
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def drawn(model, total, shape, seed=0):
    """Masks of `total` weights; how the budgets are split makes no difference."""
    names = list(maskable(model))
    budgets = {name: 1 for name in names}
    budgets[names[0]] += total - len(names)
    return separable(model, budgets, shape, torch.Generator().manual_seed(seed))


def check(model, masks, total, shape):
    assert sum(int(mask.sum()) for mask in masks.values()) == total
    assert min(int(mask.sum()) for mask in masks.values()) >= 1
    assert all(torch.equal(masks[name], on) for name, on in on_path(model, masks, shape).items())


@pytest.mark.parametrize(
    "name, size, density",
    [
        ("resnet18", 16, 3e-4),
        ("resnet20", 16, 1e-2),
        ("vgg16", 16, 1e-3),
        ("cnn", 16, 1e-2),
        ("mlp", 16, 1e-2),
        ("wrn-16-2", 16, 1e-2),
        ("torchvision:resnet18", 64, 3e-4),
        ("torchvision:mobilenet_v2", 64, 2e-2),
    ],
)
def test_counts_are_exact_and_every_weight_is_on_a_path(name, size, density):
    model, shape = models.build(name, 10, image_size=size), (3, size, size)
    total = round(density * theoretical_size(model))
    check(model, drawn(model, total, shape), total, shape)


@settings(max_examples=15, deadline=None)
@given(st.integers(60, 4000), st.integers(0, 9))
def test_every_total_is_met_exactly(total, seed):
    check(NARROW, drawn(NARROW, total, (3, 8, 8), seed), total, (3, 8, 8))


NARROW = models.build("resnet18", 10, width=8)


def test_a_total_for_all_weights_is_met_too():
    total = theoretical_size(NARROW)
    assert all(mask.all() for mask in drawn(NARROW, total, (3, 8, 8)).values())


def test_opening_blocks_have_kernels_then_pairs_and_other_blocks_one_weight_a_layer():
    model = models.build("resnet34", 10)
    masks = {name.removesuffix(".weight"): mask for name, mask in drawn(model, 2127, (3, 16, 16)).items()}
    width = int(masks["conv1"].flatten(1).any(1).sum())
    assert masks["conv1"].sum() >= 27 * width
    for stage in (2, 3, 4):
        kernels, pairs = (masks[f"layer{stage}.0.{conv}"].flatten(2) for conv in ("conv1", "conv2"))
        whole = kernels.all(2)
        assert whole.sum() == width and (whole.sum(0) <= 1).all() and (whole.sum(1) <= 1).all()
        assert pairs[:, :, 4].sum() >= width**2
        assert masks[f"layer{stage}.0.shortcut.0"].sum() == masks[f"layer{stage}.1.conv1"].sum() == 1


def test_draws_repeat_and_seeds_differ():
    def flat(seed):
        return torch.cat([mask.flatten() for mask in drawn(NARROW, 900, (3, 8, 8), seed).values()])

    assert torch.equal(flat(1), flat(1)) and not torch.equal(flat(1), flat(2))


def test_shared_weights_are_drawn_once():
    model = models.build("resnet34", 10, width=16)
    share(model)
    check(model, drawn(model, 1500, (3, 16, 16)), 1500, (3, 16, 16))


def test_a_total_too_small_for_the_pattern_is_drawn_connected():
    model = models.build("resnet20", 10)
    total = len(maskable(model)) + 10
    check(model, drawn(model, total, (3, 16, 16)), total, (3, 16, 16))


def test_a_layer_on_no_path_is_refused():
    class Unused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UsageError, match="unused"):
        drawn(Unused(), 8, (4,))
