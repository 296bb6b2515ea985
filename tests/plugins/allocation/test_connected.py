"""Connected masks: exact budgets, every weight on a path, and the same after topology updates."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins.errors import UsageError
from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import on_path
from east_plugins.ops.select import lowest_k, top_k
from east_plugins.plugins.allocation.connected import draw, reconnect
from east_plugins.plugins.allocation.layerwise import budgets, random_mask
from east_plugins.plugins.registry import allocation
from east_plugins.plugins.transform.dct.convert import convert
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def erk(model, density, size=None):
    weights = maskable(model)
    total = max(len(weights), round(density * (size or theoretical_size(model))))
    return budgets("ERK", {name: weight.shape for name, weight in weights.items()}, total)


def check(model, masks, counts, input_shape, allowed=0.0):
    """Every count is exact, and at most a share `allowed` of the active weights is off path."""
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    off = sum(counts.values()) - on_path_count(model, masks, input_shape)
    assert off <= allowed * sum(counts.values())


def on_path_count(model, masks, input_shape):
    return sum(int(mask.sum()) for mask in on_path(model, masks, input_shape).values())


PAPER = pytest.mark.parametrize("name, classes", [("resnet34", 100), ("resnet50", 10)])
SPARSITIES = pytest.mark.parametrize("density", [0.001, 0.0005, 0.0001])


@PAPER
@SPARSITIES
def test_every_weight_is_on_a_path_in_the_papers_networks(name, classes, density):
    model = models.build(name, classes)
    counts = erk(model, density)
    check(model, draw(model, counts, (3, 32, 32), generator()), counts, (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@PAPER
@SPARSITIES
def test_every_weight_is_on_a_path_for_five_seeds_with_and_without_sharing(name, classes, density, shared):
    model = models.build(name, classes)
    if shared:
        share(model)
    counts = erk(model, density)
    for seed in range(5):
        check(model, draw(model, counts, (3, 32, 32), generator(seed)), counts, (3, 32, 32))


def random_on_path(model, density, seed):
    """Weights on a path and all weights of a random mask with ERK's budgets."""
    counts, draws = erk(model, density), generator(seed)
    masks = {name: random_mask(weight.shape, counts[name], draws) for name, weight in maskable(model).items()}
    return on_path_count(model, masks, (3, 32, 32)), sum(counts.values())


def test_a_random_mask_of_resnet34_at_9999_is_disconnected():
    on, total = random_on_path(models.build("resnet34", 10), 0.0001, 0)
    assert total == 2127 and on < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, density, low, high",
    [
        ("resnet34", 0.001, 18000, 20000),
        ("resnet34", 0.0005, 6000, 7200),
        ("resnet34", 0.0001, 0, 50),
        ("resnet50", 0.001, 8500, 11000),
        ("resnet50", 0.0005, 0, 300),
        ("resnet50", 0.0001, 0, 0),
    ],
)
def test_random_masks_collapse_where_training_does(name, density, low, high):
    model = models.build(name, 10)
    for seed in range(5):
        assert low <= random_on_path(model, density, seed)[0] <= high


NETWORKS = {"resnet20": 32, "resnet56": 16, "vgg16": 32, "wrn-10-2": 8, "lenet5": 28, "mlp": 8, "cnn": 16}


@pytest.mark.parametrize("density", [0.5, 0.03, 0.001, 0.0001])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_on_a_path_in_every_family(name, density):
    size = NETWORKS[name]
    model = models.build(name, 10, image_size=size, width=None if name in ("mlp", "lenet5") else 8)
    counts = erk(model, density)
    check(model, draw(model, counts, (3, size, size), generator()), counts, (3, size, size))


class Inverted(nn.Module):
    """Pointwise, depthwise, gate, pointwise, residual: MobileNet's block; beside it a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project, self.grouped = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=4)

    def forward(self, x):
        y = F.hardswish(self.depthwise(F.relu6(self.expand(x))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return torch.cat([x + self.project(y), self.grouped(x)], 1)


class Mixed(nn.Module):
    """Concatenation, transposed convolution, a padded shortcut, one layer used twice, global max-pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.down = nn.Conv2d(3, 8, 3, padding=1), Inverted(), nn.Conv2d(24, 32, 3, 2, 1)
        self.up, self.twice, self.head = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(16, 16, 1), nn.Linear(40, 10)

    def forward(self, x):
        x = self.block(F.relu(self.stem(x)))
        y = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8)))
        y = self.twice(F.gelu(self.twice(self.up(y))))
        return self.head(F.log_softmax(torch.cat([x, y], 1), 1).amax((2, 3)))


@pytest.mark.parametrize("per_layer", [5, 30])
def test_every_weight_is_on_a_path_through_groups_gates_and_concatenations(per_layer):
    model = Mixed()
    counts = {name: min(per_layer, weight.numel()) for name, weight in maskable(model).items()}
    for seed in range(5):
        check(model, draw(model, counts, (3, 8, 8), generator(seed)), counts, (3, 8, 8))


def test_inputs_and_outputs_are_used_where_the_budgets_allow_it():
    model = models.build("resnet20", 10, width=8)
    masks = draw(model, erk(model, 0.01), (3, 16, 16), generator())
    assert masks["conv1.weight"].any((0, 2, 3)).all() and masks["fc.weight"].any(1).all()


def test_is_registered_as_an_allocation_that_draws():
    entry = allocation.entry("connected")
    assert entry.meta == {"draws": True} and entry.bound().budgets == "ERK"


def test_depends_on_the_generator_only_and_leaves_the_model_as_it_was():
    model = models.build("resnet20", 10, width=8)
    counts = erk(model, 0.01)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, again, other = (draw(model, counts, (3, 16, 16), generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in counts)
    assert not all(torch.equal(first[name], other[name]) for name in counts)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state()) and model.training


def test_dct_layers_need_no_care():
    model = models.build("resnet20", 10, width=4)
    convert(model)
    counts = erk(model, 0.001)
    check(model, draw(model, counts, (3, 16, 16), generator()), counts, (3, 16, 16))


def test_taps_that_read_only_padding_are_left_out():
    model = models.build("vgg16", 10, image_size=16, width=8)  # its last layers see one pixel: one tap of nine
    counts = erk(model, 0.01)
    masks = draw(model, counts, (3, 16, 16), generator())
    check(model, masks, counts, (3, 16, 16))
    assert masks["features.40.weight"][:, :, 1, 1].sum() == counts["features.40.weight"]


def test_budgets_that_do_not_fit_on_paths_are_kept():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2, 1))
    masks = draw(model, {"0.weight": 5, "2.weight": 2}, (1, 1, 1), generator())
    assert masks["0.weight"].sum() == 5 and masks["0.weight"][:, :, 1, 1].all() and masks["2.weight"].all()


def test_refuses_a_layer_on_no_path():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].unused = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="^`sparse_init` connected: layer 0.unused.weight lies on no path .*$"):
        draw(model, {name: 1 for name in maskable(model)}, (2,), generator())


def update(model, masks, weights, counts, rate, draws, input_shape):
    """A topology update as a host does it: drop the smallest, grow at random, bring back onto paths."""
    before = {name: mask.clone() for name, mask in masks.items()}
    scores = {}
    for name, mask in masks.items():
        importance, growth = weights[name].abs(), torch.rand(mask.shape, generator=draws)
        scores[name] = torch.where(mask, importance, growth)
        active = int(mask.sum())
        keep = max(1, round((1 - rate) * min(active, counts[name])))
        mask.view(-1)[lowest_k(importance, active - keep, mask, draws)] = False
        mask.view(-1)[top_k(growth, counts[name] - keep, ~mask, draws)] = True
    reconnect(model, masks, before, scores, input_shape, draws)
    for name, mask in masks.items():
        noise = torch.randn(mask.shape, generator=draws)
        weights[name] = mask * torch.where(before[name], 0.9 * weights[name] + 0.3 * noise, 0.3 * noise)


@pytest.mark.parametrize("start, peak", [("connected", 1), ("connected", 10), ("ERK", 1)])
@pytest.mark.parametrize("density", [0.003, 0.0003])
def test_twenty_updates_keep_every_weight_on_a_path(density, start, peak):
    model, shape, draws = models.build("resnet20", 10), (3, 16, 16), generator(1)
    counts = erk(model, density)
    if start == "connected":
        masks = draw(model, counts, shape, draws)
    else:
        masks = {name: random_mask(weight.shape, counts[name], draws) for name, weight in maskable(model).items()}
    weights = {name: torch.randn(mask.shape, generator=draws) * mask for name, mask in masks.items()}
    for i in range(20):
        rise = 1 - abs(i - 10) / 10 if i < 19 else 0
        counts = erk(model, density * (1 + (peak - 1) * rise))
        update(model, masks, weights, counts, 0.5, draws, shape)
        check(model, masks, counts, shape, 0.002)


def test_an_update_that_is_on_paths_already_changes_nothing():
    model, shape, draws = models.build("resnet20", 10, width=8), (3, 16, 16), generator()
    masks = draw(model, erk(model, 0.01), shape, draws)
    before = {name: mask.clone() for name, mask in masks.items()}
    reconnect(model, masks, before, {name: torch.zeros(mask.shape) for name, mask in masks.items()}, shape, draws)
    assert all(torch.equal(before[name], mask) for name, mask in masks.items())


def test_grown_weights_go_where_their_score_is_highest_and_on_a_path():
    model, shape = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (4,)
    before = {name: torch.eye(4, dtype=torch.bool) & (torch.arange(4) < 2) for name in maskable(model)}
    masks = {name: mask.clone() for name, mask in before.items()}
    masks["0.weight"][3, 3] = True  # grown: writes a neuron that is not read
    masks["2.weight"][3, 3] = True  # grown: reads one that only the other grown weight writes: a path of their own
    masks["2.weight"][2, 2] = True  # grown: reads one that is not written
    scores = {name: torch.zeros(4, 4) for name in masks}
    scores["2.weight"][1, 3] = 9.0  # the highest, and after neuron 3 is written on a path
    reconnect(model, masks, before, scores, shape, generator())
    assert masks["0.weight"][3, 3] and masks["2.weight"][3, 3] and masks["2.weight"][1, 3]
    assert all((masks[name] & before[name]).sum() == 2 for name in masks)


def test_a_cut_layer_is_connected_again_through_what_it_had():
    """A prune left each layer of a branch weights that do not meet."""
    model, shape = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)), (3,)
    before = masks_at(model, ((0, 0), (1, 1)), ((0, 0), (1, 1)), ((0, 0), (1, 1)))
    masks = masks_at(model, ((0, 0), (5, 1)), ((3, 2), (4, 4)), ((1, 1), (2, 5)))
    scores = {name: torch.where(old, 1.0, 0.0) for name, old in before.items()}
    reconnect(model, masks, before, scores, shape, generator())
    assert on_path_count(model, masks, shape) == sum(int(mask.sum()) for mask in masks.values()) == 6
    assert masks["0.weight"][0, 0] and masks["2.weight"][1, 1]  # kept by the prune, and of use again


def masks_at(model, *positions):
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in maskable(model).items()}
    for mask, active in zip(masks.values(), positions, strict=True):
        for index in active:
            mask[index] = True
    return masks


def test_scores_may_be_anything():
    model, shape, draws = models.build("resnet20", 10, width=4), (3, 16, 16), generator()
    counts = erk(model, 0.01)
    before = draw(model, counts, shape, draws)
    for value in (0.0, torch.inf, -torch.inf, torch.nan):
        masks = {name: random_mask(mask.shape, counts[name], draws) for name, mask in before.items()}
        scores = {name: torch.full(mask.shape, value) for name, mask in masks.items()}
        reconnect(model, masks, before, scores, shape, draws)
        check(model, masks, counts, shape)
