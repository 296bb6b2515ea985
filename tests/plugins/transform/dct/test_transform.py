import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins.measure.costs import costs
from east_plugins.ops.maskable import maskable
from east_plugins.plugins.allocation.layerwise import budgets
from east_plugins.plugins.transform import dct
from east_plugins.plugins.transform.dct import transform
from east_plugins.training import models

CPU = torch.device("cpu")
SHAPES = [
    (5, 3, 3, 3),  # truncated: 27 > 5
    (40, 3, 3, 3),  # padded: 27 < 40
    (27, 3, 3, 3),
    (7, 4),
    (4, 7),
    (6, 5, 4),
    (9, 2, 1, 1),
    (3, 2, 2, 3),
    (4, 2, 2, 3, 2),
    (1, 1),
]


def double(make, shape):
    return make(shape, torch.float64, CPU)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_is_the_orthonormal_dct_of_patches_with_the_kernel_outermost(shape):
    fft = pytest.importorskip("scipy.fft")
    patches = torch.randn(6, *shape[1:], dtype=torch.float64)
    vectors = patches.movedim(1, -1).flatten(1)
    expected = fft.dct(vectors.numpy(), n=transform.size(shape), norm="ortho")[:, : shape[0]]
    found = torch.einsum("bi,oi->bo", patches.flatten(1), double(dct.matrix, shape).flatten(1))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_square_matrix_is_orthogonal():
    square = double(dct.matrix, (27, 3, 3, 3)).flatten(1)
    torch.testing.assert_close(square @ square.T, torch.eye(27, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_multiply_to_the_matrix(shape):
    product = sum(channels * taps for channels, taps in double(transform.factors, shape))
    torch.testing.assert_close(product, double(dct.matrix, shape), atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 40), out=st.integers(1, 40))
def test_fft_gives_the_matrix_product(length, out):
    x = torch.randn(3, length, dtype=torch.float64)
    expected = x @ double(transform.matrix, (out, length)).T
    torch.testing.assert_close(transform.dct(x, out), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(transform.dct(x.float(), out), expected.float(), atol=1e-5, rtol=0)


def test_macs_of_the_fast_transform():
    assert dct.macs((8, 16)) == dct.macs((16, 8)) == dct.macs((4, 4, 2, 2)) == 16 * 4 / 2
    assert dct.macs((64, 16), groups=3) == 3 * 64 * 6 / 2


def test_memory_of_resnet34_in_the_papers_table_6():
    """EAST, Table 6: 162.66 MiB, the parameters and one fixed matrix a layer."""
    model = models.build("resnet34", 100)
    plain = sum(p.numel() for p in model.parameters())
    dct.convert(model)
    fixed = sum(layer.fixed_numel for layer in model.modules() if isinstance(layer, dct.DCTLayer))
    assert (plain, fixed) == (21_328_292, 21_311_168)
    assert round((plain + fixed) * 4 / 2**20, 2) == 162.66  # also with the 37 alphas
    assert round(costs(model, (3, 32, 32)).stored_mib, 2) == 162.66


@pytest.mark.parametrize("density, expected", [(0.0005, 40.26), (0.0001, 39.09)])
def test_multiplications_of_resnet50_in_the_papers_table_2(density, expected):
    """EAST, Table 2: of every layer the fast transform and, at each output position, the weights that ERK gives."""
    model = models.build("resnet50", 10)
    positions = count_positions(model)
    dct.convert(model)
    shapes = {name: tuple(weight.shape) for name, weight in maskable(model).items()}
    total = round(density * sum(weight.numel() for weight in maskable(model).values()))
    active = budgets("ERK", shapes, total)
    by_hand = sum(positions[name] * (dct.macs(shape) + active[name]) for name, shape in shapes.items())
    assert by_hand / 1e6 == pytest.approx(expected, abs=0.005)
    assert costs(model, (3, 32, 32), active).sparse_macs == round(by_hand)


def count_positions(model):
    positions = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, _, out, name=name: positions.update({f"{name}.weight": out.numel() // len(m.weight)})
            )
    model.eval()(torch.zeros(1, 3, 32, 32))
    return positions


published = pytest.mark.skipif("EAST_DCTPS" not in os.environ, reason="EAST_DCTPS names no checkout of DCTpS")


@pytest.fixture
def modules(monkeypatch):
    """`code.modules` of the checkout; the standard library has a module `code` too."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "code"}
    for name in saved:
        del sys.modules[name]
    monkeypatch.syspath_prepend(os.environ["EAST_DCTPS"])
    import code.modules

    yield code.modules
    for name in [name for name in sys.modules if name.split(".")[0] == "code"]:
        del sys.modules[name]
    sys.modules.update(saved)


@published
@pytest.mark.parametrize(
    "options",
    [
        dict(in_planes=10, planes=20, kernel_size=3, padding=1),
        dict(in_planes=3, planes=30, kernel_size=3, stride=2, padding=1, bias=True),
        dict(in_planes=12, planes=8, kernel_size=1, stride=2),
        dict(in_planes=8, planes=12, kernel_size=5, padding=2, groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["dense", "fft", "separable"])
def test_equals_the_published_convolution(modules, options, engine):
    theirs = modules.DCTplusConv2d(**options)
    names = dict(in_planes="in_channels", planes="out_channels")
    ours = dct.DCTConv2d(**{"bias": False} | {names.get(k, k): v for k, v in options.items()}, engine=engine)
    compare_with_published(ours, theirs, theirs.conv, torch.randn(2, ours.in_channels, 9, 9))


@published
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("engine", ["dense", "fft"])
def test_equals_the_published_linear_layer(modules, shape, engine):
    theirs = modules.DCTplusLinear(*shape)
    compare_with_published(dct.DCTLinear(*shape, engine=engine), theirs, theirs.linear, torch.randn(4, shape[0]))


def compare_with_published(ours, theirs, plain, x):
    torch.testing.assert_close(ours.matrix(), theirs.dct.weight.data, atol=1e-7, rtol=0)
    with torch.no_grad():
        theirs.scaling.fill_(0.7)
        ours.load_state_dict({"alpha": theirs.scaling, **plain.state_dict()})
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
