"""The linearised twin: which weights lie on a path, on networks where the answer is known."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins.ops.maskable import maskable, theoretical_size
from east_plugins.ops.paths import effective_density, on_path, path_positions
from east_plugins.plugins.activation.dyrelu import DyReLUB
from east_plugins.plugins.activation.phased import attach
from east_plugins.plugins.allocation.layerwise import random_mask
from east_plugins.plugins.transform.dct.convert import convert
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def masks_of(model, *active):
    """Empty masks, of which the given (name, index) positions are active."""
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in maskable(model).items()}
    for name, index in active:
        masks[f"{name}.weight"][index] = True
    return masks


def random_masks(model, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_mask(weight.shape, max(1, round(density * weight.numel())), generator)
        for name, weight in maskable(model).items()
    }


def positions(mask):
    return {tuple(index) for index in mask.nonzero().tolist()}


def test_chain():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    masks = masks_of(model, ("0", (0, 1)), ("0", (1, 2)), ("2", (1, 0)), ("2", (0, 2)))
    on = on_path(model, masks, (3,))
    assert positions(on["0.weight"]) == {(0, 1)}  # hidden 1 is not read, hidden 2 not reached
    assert positions(on["2.weight"]) == {(1, 0)}
    found = path_positions(model, masks, (3,))
    assert positions(found["0.weight"]) == {(o, i) for o in (0, 2) for i in range(3)}  # every read neuron
    assert positions(found["2.weight"]) == {(o, i) for o in range(2) for i in (0, 1)}  # every reached neuron
    assert effective_density(model, masks, (3,)) == 2 / 15


class Residual(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.branch = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(2, 1)
        self.relu = nn.ReLU(inplace)

    def forward(self, x):
        x = self.stem(x)
        x += self.branch(F.relu(x))
        return self.head(self.relu(x).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_residual_connection_passes_beside_its_branch(inplace):
    model = Residual(inplace)
    masks = masks_of(model, ("stem", (0, 0)), ("branch", (1, 0)), ("head", (0, 0)))
    on = on_path(model, masks, (1, 4, 4))
    assert on["stem.weight"].sum() == on["head.weight"].sum() == 1
    assert on["branch.weight"].sum() == 0  # writes channel 1, which the head does not read
    masks["head.weight"][0, 1] = True
    assert on_path(model, masks, (1, 4, 4))["branch.weight"].sum() == 1


def test_concatenation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.head(torch.cat([self.a(x), self.b(x)], 1))

    model = Net()
    on = on_path(model, masks_of(model, ("a", (0, 0)), ("b", (0, 0)), ("head", (0, 1))), (2,))
    assert {name: int(mask.sum()) for name, mask in on.items()} == {"a.weight": 0, "b.weight": 1, "head.weight": 1}


def test_depthwise_convolution_keeps_channels_apart():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(32, 1))
    masks = masks_of(model, ("0", (0, 0)), ("1", (slice(None), 0, 1, 1)), ("3", (0, slice(None))))
    on = on_path(model, masks, (1, 4, 4))
    assert positions(on["1.weight"]) == {(0, 0, 1, 1)}
    assert positions(on["3.weight"]) == {(0, i) for i in range(16)}


def test_tap_that_reads_only_padding():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(1, 1))
    dense = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in maskable(model).items()}
    assert positions(path_positions(model, dense, (1, 1, 1))["0.weight"]) == {(0, 0, 1, 1)}


def test_paths_that_are_shifted_out_of_the_image():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)])
    corner = masks_of(model, *[(str(i), (0, 0, 0, 0)) for i in range(4)])
    assert sum(mask.sum() for mask in on_path(model, corner, (1, 5, 5)).values()) == 4
    assert sum(mask.sum() for mask in on_path(model, corner, (1, 4, 4)).values()) == 0


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    density=st.floats(0.05, 1),
    seed=st.integers(0, 2**16),
)
def test_equals_reachability_in_any_mlp(widths, density, seed):
    layers = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])
    masks = random_masks(model, density, seed)
    reached, read = [torch.ones(widths[0], dtype=torch.bool)], [torch.ones(widths[-1], dtype=torch.bool)]
    for mask in masks.values():
        reached.append((mask & reached[-1]).any(1))
    for mask in reversed(masks.values()):
        read.insert(0, (mask & read[0][:, None]).any(0))
    found = path_positions(model, masks, (widths[0],))
    for i, name in enumerate(masks):
        assert torch.equal(found[name], read[i + 1][:, None] & reached[i])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.003, 0.02])
def test_equals_the_gradient_of_a_plain_float64_twin(density, seed, monkeypatch):
    model = models.build("resnet20", 10, width=8)
    masks = random_masks(model, density, seed)
    found = path_positions(model, masks, (3, 16, 16))
    twin = copy.deepcopy(model).double()
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    for name, parameter in twin.named_parameters():
        parameter.data = masks[name].double() if name in masks else torch.zeros_like(parameter)
    twin(torch.ones(1, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(found[name], twin.get_parameter(name).grad > 0) for name in masks)


def test_no_depth_overflows_or_underflows():
    model = nn.Sequential(*[nn.Linear(30, 30) for _ in range(400)])
    dense = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in maskable(model).items()}
    assert all(found.all() for found in path_positions(model, dense, (30,)).values())
    wide = nn.Linear(10, 10)  # here 1 of 10 paths goes through all of the narrow ones
    narrow = nn.Sequential(wide, *[nn.Sequential(nn.Linear(10, 10)) for _ in range(400)])
    masks = {name: torch.eye(10, dtype=torch.bool) for name in maskable(narrow)}
    assert all(
        torch.equal(found, torch.ones(10, 10, dtype=torch.bool))
        for found in path_positions(narrow, masks, (10,)).values()
    )


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(True),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.GELU(),
        nn.PReLU(),
        nn.LeakyReLU(),
        nn.SiLU(),
        nn.Mish(),
        nn.Hardswish(),
        nn.Softplus(),
        nn.ELU(),
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.Dropout(),
        nn.BatchNorm1d(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_dead_neuron_is_not_reached_through_norm_or_activation(module):
    model = nn.Sequential(nn.Linear(2, 4), module, nn.Linear(4, 1))
    masks = masks_of(model, ("0", (0, 0)), ("2", (0, slice(None))))
    assert positions(on_path(model, masks, (2,))["2.weight"]) == {(0, 0)}


@pytest.mark.parametrize("seed", range(3))
def test_max_pooling_reads_every_position(seed):
    def net(pool):
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            pool,
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 2),
        )

    masks = random_masks(net(nn.Identity()), 0.25, seed)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}):
        peak, mean = (path_positions(net(pool(**options)), masks, (1, 8, 8)) for pool in (nn.MaxPool2d, nn.AvgPool2d))
        assert all(torch.equal(peak[name], mean[name]) for name in masks)


def test_tied_weights_count_once_over_the_unshared_size():
    model = models.build("resnet20", 10, width=4)
    share(model)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in maskable(model).items()}
    total = sum(mask.numel() for mask in masks.values())
    assert effective_density(model, masks, (3, 16, 16)) == total / theoretical_size(model) < 1


def test_phased_activations_do_not_matter():
    model = models.build("resnet20", 10, width=4)
    masks = random_masks(model, 0.05, 0)
    plain = path_positions(model, masks, (3, 16, 16))
    phased = attach(model, DyReLUB, (3, 16, 16))
    phased.set_beta(0.5)
    blended = path_positions(model, masks, (3, 16, 16))
    assert all(torch.equal(plain[name], blended[name]) for name in masks)
    assert {site.phase for site in phased.sites} == {"blend"}


def test_dct_layers_connect_everything():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    convert(model)
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in maskable(model).items()}
    assert all(found.all() for found in path_positions(model, masks, (1, 4, 4)).values())


def test_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))
    model[1].eval()
    model(torch.randn(1, 1, 4, 4)).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    training, random_state = [m.training for m in model.modules()], torch.get_rng_state()
    on_path(model, random_masks(model, 0.5, 0), (1, 4, 4))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert training == [m.training for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())


def test_weights_without_a_mask_and_without_a_use():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model.unused = nn.Identity()
    model.unused.head = nn.Linear(2, 2)
    found = path_positions(model, {name: torch.ones(2, 2).bool() for name in ("0.weight", "unused.head.weight")}, (2,))
    assert found["0.weight"].all() and not found["unused.head.weight"].any()
    assert path_positions(model, {}, (2,)) == {}
