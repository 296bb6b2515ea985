"""`Masking.of`: a method by name in a script of one's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from east_plugins import Config, Masking
from east_plugins.errors import UsageError
from east_plugins.options.methods import METHODS
from east_plugins.training import models

SHAPE = (1, 8, 8)


def network(name="resnet20"):
    torch.manual_seed(0)
    return models.build(name, 10, 1, 8, 4)


def steps(model, optimizer, mask, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, y = torch.randn(8, *SHAPE, generator=generator), torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        mask.step()


@pytest.mark.parametrize("method", [*METHODS, "rigl+connected", "set+dyrelu", "east+connected"])
def test_every_method_trains_at_its_density(method):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    density = None if method == "dense" else 0.1
    data = [(torch.randn(20, *SHAPE), torch.arange(20) % 10)]
    mask = Masking.of(method, model, optimizer, density=density, steps=60, input_shape=SHAPE, batches=data)
    steps(model, optimizer, mask, 60)
    wanted, expected = round((density or 1) * mask.theoretical_size), mask.target_nonzeros(60)
    counted_by_layer = method == "east" and 0.95 * wanted < expected < wanted  # by rounding down
    assert (expected == wanted or counted_by_layer) and mask.is_at(60)
    assert mask.nonzeros == expected or mask.structure and 0.95 * expected < mask.nonzeros < expected
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_the_host_is_that_of_the_trainer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    mask = Masking.of("granet", model, optimizer, density=0.1, steps=352 * 250, epochs=250)
    resolved = Config(method="granet", density=0.1, epochs=250).resolve(352)
    assert mask.schedule == resolved.schedule() and mask.death_rate_decay == resolved.rate_decay()
    assert (mask.schedule.frequency, mask.schedule.last, mask.schedule.initial) == (1000, 60_500, 0.5)


@pytest.mark.parametrize(("name", "silent"), [("resnet20", 7), ("vgg16", 0)])
def test_open_starts_with_silent_blocks_where_there_are_any(name, silent):
    """In a host of one's own as in the trainer; its masks are whole kernels and pairs of channels, never updated."""
    torch.manual_seed(0)
    model = models.build(name, 10, 3, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    mask = Masking.of("open", model, optimizer, density=0.05, steps=40, input_shape=(3, 32, 32))
    norms = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(bool((weight == 0).all()) for weight in norms) == silent
    assert mask.sparse_init == "separable" and mask.schedule.frequency is None
    with pytest.raises(UsageError, match="`quiet_branches` needs `input_shape`"):
        Masking.of("open", model, optimizer, density=0.05, steps=40)


def test_silent_blocks_that_were_asked_for_must_be_there():
    model = models.build("vgg16", 10, 3, 32, 8)
    settings = dict(density=0.05, steps=40, input_shape=(3, 32, 32), quiet_branches="loops")
    with pytest.raises(UsageError, match="no residual branch"):
        Masking.of("rigl", model, torch.optim.SGD(model.parameters(), 0.01), **settings)


def test_settings_and_options_of_plugins_are_taken():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    settings = dict(death="threshold", death_threshold=0.5, update_frequency=3, death_rate=0.2)
    mask = Masking.of("rigl", model, optimizer, density=0.1, steps=40, **settings)
    assert (mask.schedule.frequency, mask.death_rate, mask.death_mode) == (3, 0.2, "threshold")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(method="riggl"), "did you mean rigl"),
        (dict(density=2), "`density` must be in"),
        (dict(steps=0), "`steps` 0"),
        (dict(method="rigl+dctps"), "convert the model before"),
        (dict(method="rigl+dyrelu", input_shape=None), "`input_shape`"),
        (dict(growth_tau=1), "`growth_tau`"),
        (dict(method="east", east_cyclic_multiplier=100), "`east_cyclic_multiplier`"),
    ],
    ids=str,
)
def test_what_cannot_be_changes_nothing(wrong, words):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before, held = {id(p) for p in model.parameters()}, list(optimizer.param_groups[0]["params"])
    keys = list(model.state_dict())
    given = {"method": "rigl", "density": 0.1, "steps": 40, "input_shape": SHAPE, **wrong}
    with pytest.raises(UsageError, match=words):
        Masking.of(given.pop("method"), model, optimizer, **given)
    assert {id(p) for p in model.parameters()} == before and list(model.state_dict()) == keys
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in held]


@pytest.mark.parametrize("method", ["rigl+share", "rigl+dyrelu", "east"])
def test_another_models_optimizer_is_refused_before_anything_is_changed(method):
    model = network()
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    shared = len({id(parameter) for parameter in model.parameters()})
    with pytest.raises(UsageError, match="the optimizer holds no parameter of the model"):
        stranger = torch.optim.SGD(network().parameters(), 0.01)
        Masking.of(method, model, stranger, density=0.1, steps=40, input_shape=SHAPE)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    assert len({id(parameter) for parameter in model.parameters()}) == shared


def test_sharing_that_finds_no_blocks_leaves_no_activations_behind():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match="`east_share`"):
        Masking.of("east", model, optimizer, density=0.1, steps=40, input_shape=SHAPE)
    assert list(model.state_dict()) == keys and type(model) is nn.Sequential
