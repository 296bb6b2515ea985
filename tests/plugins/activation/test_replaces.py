"""Activations in place of others than ReLU, where that is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Engine, Masking
from east_plugins.errors import NothingMatchedError, UsageError
from east_plugins.options.east import REPLACED, EastOptions
from east_plugins.plugins.activation import PhaseOut, attach, factory
from east_plugins.plugins.activation.probe import FUNCTIONS

SHAPE = (3, 6, 6)


class Net(nn.Module):
    """Two calls of an activation, one of ReLU between them."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.norm, self.call = nn.BatchNorm2d(8), call
        self.double()

    def forward(self, x):
        x = F.relu(self.norm(self.call(self.a(x))))
        return self.fc(self.call(self.b(x)).mean((2, 3)))


CALLS = {
    "nn.ReLU6": ("relu6", lambda: nn.ReLU6()),
    "F.relu6": ("relu6", lambda: F.relu6),
    "nn.GELU": ("gelu", lambda: nn.GELU()),
    "nn.GELU tanh": ("gelu", lambda: nn.GELU("tanh")),
    "nn.SiLU": ("silu", lambda: nn.SiLU()),
    "nn.SiLU in place": ("silu", lambda: nn.SiLU(inplace=True)),
    "nn.Hardswish": ("hardswish", lambda: nn.Hardswish()),
    "F.hardswish in place": ("hardswish", lambda: lambda x: F.hardswish(x, inplace=True)),
}
every_call = pytest.mark.parametrize("call", CALLS)


def batch(seed=0):
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_call
def test_what_is_asked_for_is_replaced_and_ends_as_it_was(call):
    name, make = CALLS[call]
    model, plain = Net(make()), Net(make())
    phased = attach(model, factory("b"), SHAPE, replaces=(name,), phase_out=PhaseOut(1, 2))
    assert len(phased.sites) == 2
    x, full = batch(), model(batch())
    assert (full - plain(x)).abs().max() > 1e-3
    phased.set_beta(0.0)
    assert torch.equal(model(x), plain(x))
    phased.set_beta(1e-12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    phased.remove()
    assert torch.equal(model(x), plain(x)) and model.state_dict().keys() == plain.state_dict().keys()


def test_a_blend_is_of_the_activation_and_what_stands_in_for_it():
    class Doubled(nn.Module):
        def __init__(self, channels):
            super().__init__()

        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()).double()
    phased = attach(model, Doubled, SHAPE, replaces=("gelu",))
    phased.set_beta(0.25)
    y = model[0](batch())
    torch.testing.assert_close(model(batch()), 0.25 * 2 * y + 0.75 * F.gelu(y), rtol=1e-12, atol=1e-12)


def test_several_are_replaced_together_and_others_stay():
    model = Net(nn.SiLU())
    assert len(attach(model, factory("b"), SHAPE, replaces=("relu", "silu")).sites) == 3
    model = Net(nn.SiLU())
    assert len(attach(model, factory("b"), SHAPE).sites) == 1  # ReLU alone unless it is asked for


@every_call
@pytest.mark.parametrize("engine", ["sparse", "dense"])
def test_the_phase_is_trained_with_every_engine(call, engine):
    name, make = CALLS[call]
    trained = []
    for each in (engine, None):
        model = Net(make())
        generator = torch.Generator().manual_seed(0)
        phased = attach(
            model, factory("b"), SHAPE, replaces=(name, "relu"), phase_out=PhaseOut(3, 7), generator=generator
        )
        host = Masking(
            torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), growth_mode="gradient", update_frequency=4,
            seed=0, plugins=[phased],
        )  # fmt: skip
        host.add_module(model, density=0.3, sparse_init="connected", input_shape=SHAPE)
        if each:
            assert Engine(host, SHAPE, each).dense == (each == "dense")
        for step in range(10):
            host.optimizer.zero_grad()
            F.cross_entropy(model(batch(step)), torch.arange(4)).backward()
            host.step()
        assert not phased.sites
        trained.append((model, host))
    (ours, a), (theirs, b) = trained
    assert all(torch.equal(mask, b.masks[name]) for name, mask in a.masks.items())
    for found, wanted in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_compiled_model_computes_the_same():
    model = Net(nn.GELU("tanh"))
    phased = attach(model, factory("b"), SHAPE, replaces=("gelu",))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for beta in (1.0, 0.5, 0.0):
        phased.set_beta(beta)
        torch.testing.assert_close(compiled(batch()), model(batch()))


def test_the_flag_takes_names_with_commas():
    assert set(REPLACED) == set(FUNCTIONS)
    assert EastOptions(dyrelu=True, dyrelu_replaces="gelu, silu").dyrelu_replaced == ("gelu", "silu")
    with pytest.raises(UsageError, match=r"`east_dyrelu_replaces` 'gelu,mish': allowed are relu, .*got mish"):
        EastOptions(dyrelu=True, dyrelu_replaces="gelu,mish")


def test_what_cannot_be_is_one_line():
    with pytest.raises(NothingMatchedError, match="calls no relu, but gelu; see `east_dyrelu_replaces`"):
        attach(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), factory("b"), SHAPE)
    with pytest.raises(UsageError, match="`replaces` must be some of relu, relu6, gelu, silu, hardswish, got .*mish"):
        attach(Net(nn.GELU()), factory("b"), SHAPE, replaces=("mish",))
    with pytest.raises(UsageError, match="coefficients is for ReLU alone"):
        attach(Net(nn.GELU()), factory("b"), SHAPE, replaces=("gelu",), blend="coefficients")
