import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins.errors import UsageError
from east_plugins.plugins.transform.dct import DCTConv1d, DCTConv2d, DCTConv3d, DCTLinear

FAST = ("fft", "separable")
ENGINES = ("dense", *FAST)
CASES = {
    "truncated": (DCTConv2d, (4, 5, 3), {}, (4, 7, 6)),
    "padded": (DCTConv2d, (2, 40, 3), dict(padding=1), (2, 5, 5)),
    "odd": (DCTConv2d, (3, 27, 3), dict(padding=1), (3, 5, 5)),
    "pointwise": (DCTConv2d, (8, 6, 1), {}, (8, 4, 4)),
    "stride": (DCTConv2d, (4, 6, 3), dict(stride=2, padding=1), (4, 9, 8)),
    "pointwise stride": (DCTConv2d, (4, 6, 1), dict(stride=2), (4, 5, 5)),
    "dilation": (DCTConv2d, (4, 6, 3), dict(dilation=2, padding=2, stride=2), (4, 9, 9)),
    "groups": (DCTConv2d, (8, 12, 3), dict(groups=4, padding=1), (8, 6, 6)),
    "depthwise": (DCTConv2d, (6, 12, 3), dict(groups=6, stride=2), (6, 7, 7)),
    "rectangle": (DCTConv2d, (3, 5, (1, 4)), dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (3, 6, 9)),
    "same": (DCTConv2d, (3, 5, (4, 3)), dict(padding="same"), (3, 6, 6)),
    "valid": (DCTConv2d, (3, 5, 3), dict(padding="valid"), (3, 6, 6)),
    "reflect": (DCTConv2d, (3, 5, 3), dict(padding=2, padding_mode="reflect"), (3, 6, 6)),
    "replicate": (DCTConv2d, (3, 5, 3), dict(padding=1, padding_mode="replicate", stride=2), (3, 6, 6)),
    "circular": (DCTConv2d, (4, 6, 3), dict(padding=(1, 2), padding_mode="circular", groups=2), (4, 6, 6)),
    "no bias": (DCTConv2d, (4, 5, 3), dict(bias=False), (4, 6, 6)),
    "1d": (DCTConv1d, (3, 5, 4), dict(stride=2, padding=1), (3, 9)),
    "3d": (DCTConv3d, (2, 5, 3), dict(padding=1), (2, 4, 4, 4)),
    "linear": (DCTLinear, (7, 5), {}, (7,)),
    "wide linear": (DCTLinear, (5, 12), dict(bias=False), (5,)),
    "linear of sequences": (DCTLinear, (6, 8), {}, (3, 2, 6)),
}
PLAIN = {DCTConv1d: nn.Conv1d, DCTConv2d: nn.Conv2d, DCTConv3d: nn.Conv3d, DCTLinear: nn.Linear}


def sparse_(layer, alpha=0.7, density=0.15):
    """Random values in a few weights of S, alpha away from 1."""
    with torch.no_grad():
        layer.alpha.fill_(alpha)
        layer.weight.normal_().mul_(torch.rand(layer.weight.shape) < density)
    return layer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_explicit_weight(case, engine, dtype, tolerance):
    cls, args, options, shape = CASES[case]
    layer = sparse_(cls(*args, **options, engine=engine, dtype=torch.float64))
    plain = PLAIN[cls](*args, **options, dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "alpha"})
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    alpha = layer.alpha.detach().clone().requires_grad_()
    weights = dict(plain.named_parameters())
    explicit = weights | {"weight": alpha * layer.matrix() + plain.weight}
    output = torch.func.functional_call(plain, explicit, x)
    direction = torch.randn_like(output)
    expected = torch.autograd.grad(output, [x, alpha, *weights.values()], direction)

    layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
    found = layer(x)
    tensors = [x, layer.alpha, *(layer.get_parameter(name) for name in weights)]
    gradients = torch.autograd.grad(found, tensors, direction.to(dtype))
    for mine, theirs in zip([found, *gradients], [output, *expected], strict=True):
        scale = max(1, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs.to(dtype), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["stride", "circular", "linear"])
def test_second_derivatives(case, engine):
    cls, args, options, shape = CASES[case]
    layer = sparse_(cls(*args, **options, engine=engine, dtype=torch.float64))
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn_like(layer(x))

    def hessian_product(weight, alpha, x):
        first = torch.func.functional_call(layer, {"weight": weight, "alpha": alpha}, x).pow(3)
        return torch.autograd.grad(first, [weight, alpha, x], gradient, create_graph=True)

    tensors = [layer.weight.detach().clone().requires_grad_(), layer.alpha.detach().clone().requires_grad_(), x]
    found = torch.autograd.grad(sum(g.sin().sum() for g in hessian_product(*tensors)), tensors)
    layer.engine = "dense"
    expected = torch.autograd.grad(sum(g.sin().sum() for g in hessian_product(*tensors)), tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_of_s_is_dense_so_that_inactive_weights_can_grow(engine):
    layer = DCTConv2d(4, 6, 3, padding=1, engine=engine)  # S is zero everywhere
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert layer.weight.grad.count_nonzero() == layer.weight.numel()


def test_s_starts_at_zero_and_the_global_generator_moves_as_for_the_plain_layer():
    torch.manual_seed(1)
    plain, following = nn.Conv2d(3, 4, 3), torch.rand(1)
    torch.manual_seed(1)
    layer = DCTConv2d(3, 4, 3)
    assert not layer.weight.any() and layer.alpha == 1
    assert torch.equal(layer.bias, plain.bias) and torch.equal(torch.rand(1), following)
    layer.weight.data.fill_(1)
    layer.reset_parameters()
    assert not layer.weight.any()


def test_state_dict_holds_the_plain_names_and_alpha():
    layer = DCTConv2d(3, 4, 3)
    layer(torch.randn(1, 3, 5, 5))
    assert list(layer.state_dict()) == ["weight", "bias", "alpha"]
    fixed = DCTConv2d(3, 4, 3, alpha=0.5, trainable=False)
    assert list(dict(fixed.named_parameters())) == ["weight", "bias"]
    assert fixed.state_dict()["alpha"] == 0.5


def test_layers_of_a_shape_use_one_matrix_through_copies_and_moves():
    layers = [DCTConv2d(3, 4, 3), DCTConv2d(3, 4, 3, stride=2)]
    layers += [copy.deepcopy(layers[0]), layers[1].double().float()]
    assert len({id(layer.matrix()) for layer in layers}) == 1
    assert layers[0].double().matrix().dtype == torch.float64


def test_pickle_holds_no_matrix():
    layer = sparse_(DCTLinear(300, 300, engine="dense"))
    x = torch.randn(2, 300)
    file = io.BytesIO()
    expected = layer(x)
    torch.save(layer, file)
    assert file.tell() < 1.1 * layer.weight.nbytes
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_matrix_first_made_in_inference_mode_serves_training():
    for engine in ENGINES:
        layer = DCTConv2d(3, 11, 3, engine=engine)
        with torch.inference_mode():
            layer(torch.randn(1, 3, 5, 5))
        layer(torch.randn(1, 3, 5, 5)).sum().backward()
        assert layer.alpha.grad.isfinite()


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_inputs_without_a_batch_and_empty_ones(engine):
    layer = sparse_(DCTConv2d(3, 4, 3, engine=engine))
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0], atol=1e-5, rtol=1e-5)
    assert layer(torch.zeros(0, 3, 6, 6)).shape == (0, 4, 4, 4)
    linear = sparse_(DCTLinear(6, 4, engine=engine))
    torch.testing.assert_close(linear(x), F.linear(x, linear.effective_weight(), linear.bias), atol=1e-5, rtol=1e-5)
    assert linear(x[0, 0]).shape == (4,)


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_half_precision_and_autocast(engine):
    layer = sparse_(DCTConv2d(3, 4, 3, engine=engine))
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    output = layer.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("engine", ["auto", *FAST])
def test_layers_compile_into_one_graph(engine):
    model = nn.Sequential(DCTConv2d(3, 4, 3, engine=engine), nn.ReLU(), nn.Flatten(), DCTLinear(64, 5, engine=engine))
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_export_leaves_no_traced_tensors_behind():
    layer = DCTConv2d(3, 13, 3)
    x = torch.randn(2, 3, 6, 6)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), atol=1e-5, rtol=1e-5)


def test_unknown_engine_is_refused():
    with pytest.raises(UsageError, match="auto, dense, fft, separable"):
        DCTLinear(3, 4, engine="quick")
