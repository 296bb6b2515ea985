"""DyReLU over a part of the channels in full as one node: its values and gradients are those of the formula."""

import pytest
import torch
from torch import nn

from east_plugins.plugins.activation import factory
from east_plugins.plugins.activation.dyrelu import dynamic_relu
from east_plugins.sparse import kernel, lines
from east_plugins.sparse.split import Channels, Split
from east_plugins.sparse.taps import in_planes

SIZES = [(5, 4, 6), (130, 7, 5), (300, 3, 9)]  # images below and above what the kernel takes at a time
KEPT = {"some": [0, 2, 3], "all": [0, 1, 2, 3, 4]}


def whole(split):
    """What a Split stands for: [N, C, H, W]."""
    return split._all()


def make(size, kept, shared, seed=0, dtype=torch.float64):
    images, height, width = size
    draw = torch.Generator().manual_seed(seed)
    channels = Channels.of(torch.tensor(kept), 5, "cpu")
    x = torch.randn(len(kept), height, width, images, generator=draw, dtype=dtype).permute(3, 0, 1, 2).requires_grad_()
    of_images = (1 if shared else images, 5 - len(kept), 1, 1)
    rest = torch.randn(of_images, generator=draw, dtype=dtype).requires_grad_()
    return Split(x, rest, channels)


def layers(name, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        act = factory(name)(5).to(dtype)
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.mul_(3)
    return [act.squeeze.weight, act.squeeze.bias, act.excite.weight, act.excite.bias]


@pytest.mark.parametrize("beta", [None, 0.3], ids=["full", "blend"])
@pytest.mark.parametrize("shared", [False, True], ids=["of an image", "of the network"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["b", "a"])
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients_are_the_formulas(size, name, kept, shared, beta):
    split, parameters = make(size, KEPT[kept], shared), layers(name)
    beta = None if beta is None else torch.tensor(beta, dtype=torch.float64)
    ours = dynamic_relu(split, *parameters, beta)
    assert "_DynamicReLU" in type(ours.kept.grad_fn).__name__, "the kernel computed it"
    assert in_planes(ours.kept)
    assert in_planes(ours.rest)
    theirs = dynamic_relu(whole(split), *parameters, beta)
    torch.testing.assert_close(whole(ours), theirs, rtol=1e-12, atol=1e-12)
    leaves = [split.kept, *([split.rest] if split.rest.numel() else []), *parameters]
    towards = torch.randn_like(theirs)
    for found, wanted in zip(
        torch.autograd.grad(whole(ours), leaves, towards), torch.autograd.grad(theirs, leaves, towards), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_where_the_lines_meet_each_gets_half():
    """Of coefficients a1 = 1, a2 = 0 and equal shifts, both lines are 0 at x = 0."""
    split = make((4, 3, 3), KEPT["all"], shared=False)
    with torch.no_grad():
        split.kept.zero_()
    parameters = [torch.zeros_like(p).requires_grad_() for p in layers("b")]
    ours = dynamic_relu(split, *parameters)
    ours.kept.sum().backward()
    assert bool((split.kept.grad == 0.5).all())  # half of a1 = 1, half of a2 = 0
    shifts = parameters[3].grad.view(4, 5)[2:]
    torch.testing.assert_close(shifts, torch.full_like(shifts, 0.5 * 0.5 * 0.5 * 4 * 9))  # b = tanh(z / 2) / 2


@pytest.mark.parametrize("case", ["float16", "autocast", "gradient of beta", "no compiler"])
def test_other_cases_are_computed_by_pytorch(case, monkeypatch):
    dtype = torch.bfloat16 if case == "float16" else torch.float32
    split, parameters = make((4, 5, 5), KEPT["some"], False, dtype=dtype), layers("b", dtype)
    beta = torch.tensor(0.5, dtype=dtype, requires_grad=case == "gradient of beta")
    if case == "no compiler":
        monkeypatch.setattr(kernel, "load", lambda dtype: None)
    monkeypatch.setattr(lines, "dynamic_relu", lambda *args: pytest.fail("no kernel is wanted"))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        ours = whole(dynamic_relu(split, *parameters, beta))
        theirs = dynamic_relu(whole(split), *parameters, beta)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_the_module_is_the_function():
    act, x = factory("b")(6), torch.randn(3, 6, 4, 4)
    squeeze, excite = act.squeeze, act.excite
    wanted = dynamic_relu(x, squeeze.weight, squeeze.bias, excite.weight, excite.bias)
    torch.testing.assert_close(act(x), wanted, rtol=0, atol=0)
    assert isinstance(squeeze, nn.Linear)
