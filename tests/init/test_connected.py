import pytest
import torch
from torch import nn

from east_plugins import UsageError, models
from east_plugins.init.connected import draw, reconnect
from east_plugins.init.layerwise import budgets
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import on_path
from east_plugins.sharing import share


def draw_at(model, density, shape, seed=0):
    weights = maskable(model)
    counts = budgets("ERK", {name: w.shape for name, w in weights.items()}, round(density * theoretical_size(model)))
    masks = draw(model, counts, shape, torch.Generator().manual_seed(seed))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    return masks


def off_path(model, masks, shape):
    on = on_path(model, masks, shape)
    return sum(int((mask & ~on[name]).sum()) for name, mask in masks.items())


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "vgg16", "wrn-10-1", "mlp", "lenet5", "cnn"])
@pytest.mark.parametrize("density", [0.1, 0.03, 0.01])
def test_counts_are_erks_and_every_weight_is_on_a_path(name, density):
    width = None if name in ("mlp", "lenet5") else 8
    model = models.build(name, 10, 3, 16, width)
    masks = draw_at(model, density, (3, 16, 16))
    total = sum(int(mask.sum()) for mask in masks.values())
    assert off_path(model, masks, (3, 16, 16)) <= 0.002 * total


@pytest.mark.parametrize("seed", range(3))
def test_with_weight_sharing(seed):
    model = models.build("resnet56", 10, 3, 16, 8)
    share(model)
    assert off_path(model, draw_at(model, 0.005, (3, 16, 16), seed), (3, 16, 16)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("density", [1e-3, 5e-4, 1e-4])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_the_papers_networks_at_the_papers_sparsities(name, density, sharing):
    model = models.build(name, 10)
    if sharing:
        share(model)
    for seed in range(5):
        masks = draw_at(model, density, (3, 32, 32), seed)
        assert off_path(model, masks, (3, 32, 32)) <= 0.002 * sum(int(mask.sum()) for mask in masks.values())


def test_the_same_seed_draws_the_same_masks():
    model = models.build("resnet20", 10, 3, 16, 8)
    first, again, other = (draw_at(model, 0.01, (3, 16, 16), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_layers_that_no_path_reaches_are_refused():
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UsageError, match=r"0 weights of layer unused\.weight can lie on a path"):
        draw(Lost(), {"used.weight": 2, "unused.weight": 2}, (4,), torch.Generator())


@pytest.mark.parametrize("seed", range(3))
def test_reconnecting_after_updates_keeps_counts_and_paths(seed):
    shape, generator = (3, 16, 16), torch.Generator().manual_seed(seed)
    model = models.build("resnet20", 10, 3, 16, 8)
    masks = draw_at(model, 0.01, shape, seed)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    for _ in range(10):
        before = {name: mask.clone() for name, mask in masks.items()}
        for mask in masks.values():  # half of the weights go, as many come at random
            active, inactive = mask.flatten().nonzero().flatten(), (~mask).flatten().nonzero().flatten()
            half = len(active) // 2
            mask.view(-1)[active[torch.randperm(len(active), generator=generator)[:half]]] = False
            mask.view(-1)[inactive[torch.randperm(len(inactive), generator=generator)[:half]]] = True
        scores = {name: torch.rand(mask.shape, generator=generator) for name, mask in masks.items()}
        reconnect(model, masks, before, scores, shape, generator)
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
        assert off_path(model, masks, shape) <= max(1, 0.002 * sum(counts.values()))
