import numpy as np
import pytest
import torch
from torch import nn

from east_plugins.errors import UnknownNameError, UsageError
from east_plugins.plugins.activation import factory
from east_plugins.plugins.activation.dyrelu import max_of_lines

SHAPES = [(3, 8, 5, 4), (3, 8, 7), (3, 8)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def formula(act: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The equation, in numpy, one sample, channel and function at a time."""
    p = {name: value.detach().numpy() for name, value in act.state_dict().items()}
    x = x.detach().numpy()
    y = np.empty_like(x)
    for n, sample in enumerate(x):
        mean = sample.reshape(len(sample), -1).mean(1)
        hidden = np.maximum(p["squeeze.weight"] @ mean + p["squeeze.bias"], 0)
        delta = (2 * sigmoid(p["excite.weight"] @ hidden + p["excite.bias"]) - 1).reshape(4, -1)
        attention = 1.0
        if "spatial.weight" in p and sample.ndim > 1:
            z = np.tensordot(p["spatial.weight"][0, :, 0], sample, 1) + p["spatial.bias"]
            softmax = np.exp(z / 10) / np.exp(z / 10).sum()
            attention = np.minimum(z.size / 3 * softmax, 1)
        for c, channel in enumerate(sample):
            a1, a2, b1, b2 = delta[:, c % delta.shape[1]] if delta.shape[1] > 1 else delta[:, 0]
            lines = [(1 + a1) * channel + 0.5 * b1, a2 * channel + 0.5 * b2]
            y[n, c] = np.max([attention * line for line in lines], axis=0)
    return y


@pytest.mark.parametrize("kind", "abc")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_the_formula_in_float64(kind, shape):
    act = factory(f"dyrelu-{kind}")(8).double()
    for parameter in act.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64) * 5
    np.testing.assert_allclose(act(x).detach().numpy(), formula(act, x), rtol=1e-13, atol=1e-13)


def test_zero_weights_give_relu():
    act = factory("b")(4)
    for parameter in act.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(act(x), x.relu())


def test_33_sites_of_resnet34_have_3181168_parameters():
    widths = [64] * 7 + [128] * 8 + [256] * 12 + [512] * 6
    make = factory("b")
    with torch.device("meta"):
        assert sum(p.numel() for width in widths for p in make(width).parameters()) == 3_181_168


@pytest.mark.parametrize("kind", "abc")
def test_memory_format_dtype_and_shape_are_kept(kind):
    act = factory(kind)(16)
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
    assert act(x).is_contiguous(memory_format=torch.channels_last)
    assert act.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    act.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert act(x.bfloat16()).dtype == torch.bfloat16
        assert act(x).dtype == torch.float32


def test_every_parameter_gets_a_gradient():
    act = factory("c")(8)
    act(torch.randn(2, 8, 4, 4)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in act.parameters())


def test_fewer_channels_than_the_reduction_leave_one_hidden_unit():
    assert factory("b")(3).squeeze.out_features == 1
    assert factory("b", reduction=8)(64).squeeze.out_features == 8


@pytest.mark.parametrize("name", ["a", "B", "dyrelu_c", "prelu", "swish", "mish", "torch.nn:PReLU"])
def test_factories_by_name_keep_the_shape(name):
    x = torch.randn(2, 8, 3, 3)
    assert factory(name)(8)(x).shape == x.shape


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("dyrelu", {}, "dyrelu-a"),
        ("prelu", {"reduction": 4}, "reduction"),
        ("nowhere.to:be_found", {}, "nowhere"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        factory(name, **options)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean swish"):
        factory("swich")


def test_reduction_below_one_is_refused():
    with pytest.raises(UsageError, match="`reduction` must be at least 1, got 0"):
        factory("b", reduction=0)(8)


@pytest.mark.parametrize("shape", [(3, 4, 2, 1), (3, 1, 1, 1), (1, 4, 1, 1)], ids=str)
def test_gradients_of_the_larger_of_two_lines_are_right(shape):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn((3, 4, 2, 5), generator=draw, dtype=torch.float64)]
    inputs += [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(max_of_lines, inputs)
    assert torch.autograd.gradgradcheck(max_of_lines, inputs)
    x, *coefficients = inputs
    with torch.no_grad():
        coefficients[2].copy_(coefficients[0])  # equal lines: both get half, as from torch.maximum
        coefficients[3].copy_(coefficients[1])
    found = torch.autograd.grad(max_of_lines(*inputs).sum(), inputs)
    a1, b1, a2, b2 = coefficients
    wanted = torch.autograd.grad(torch.maximum(a1 * x + b1, a2 * x + b2).sum(), inputs)
    torch.testing.assert_close(found, wanted)
