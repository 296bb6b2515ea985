"""Convolution by blocks of channels against PyTorch's own in float64, and against the sum over taps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins.ops.active import Active
from east_plugins.sparse import kernel, taps
from east_plugins.sparse.layers import LayerPlan, Sink

KINDS = {
    "plain": nn.Conv2d(48, 40, 3, padding=1),
    "wide": nn.Conv2d(20, 24, 5, padding=2),
    "1x1": nn.Conv2d(64, 48, 1, bias=False),
    "1x1, strided": nn.Conv2d(64, 48, 1, 2),
    "grouped": nn.Conv2d(48, 48, 3, padding=1, groups=4),
    "dilated": nn.Conv2d(32, 40, 3, padding=3, dilation=3),
    "strided": nn.Conv2d(40, 48, 3, 2, 1),
    "strided unevenly": nn.Conv2d(40, 48, (3, 5), (3, 2), (0, 2), (1, 2)),
    "1-D": nn.Conv1d(48, 40, 3, padding=1),
    "3-D": nn.Conv3d(24, 20, 3, padding=1),
}
SIDES = {"1-D": (31,), "3-D": (5, 6, 7)}


def plan_of(module, mask):
    channels = torch.arange(module.in_channels), torch.arange(module.out_channels)
    return LayerPlan(module, Sink(module.weight, Active(mask)), *channels)


def as_planes(x):
    last = (*range(1, x.dim()), 0)
    return x.permute(last).contiguous().permute(x.dim() - 1, *range(x.dim() - 1))


def gradients(compute, x, module, direction):
    """The output, and the gradients of the input, the weight and the bias."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = compute(x)
    (y * direction).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def assert_equals_dense(module, x, density, tolerance=1e-9):
    mask = torch.rand_like(module.weight) < density
    with torch.no_grad():
        module.weight.mul_(mask)
        direction = torch.randn_like(module(x))
    expected = gradients(module, x, module, direction)
    expected[2] *= mask
    found = gradients(plan_of(module, mask), as_planes(x), module, direction)
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [0.01, taps.MANY, 1e9], ids=["by blocks", "as chosen", "by taps"])
def test_convolutions_at_one_to_ten_per_cent_equal_the_dense_ones(kind, density, many, monkeypatch):
    monkeypatch.setattr(taps, "MANY", many)
    torch.manual_seed(0)
    module = KINDS[kind].double()
    nn.init.normal_(module.weight)
    x = torch.randn(11, module.in_channels, *SIDES.get(kind, (9, 14)), dtype=torch.float64)
    assert_equals_dense(module, x, density)


@settings(deadline=None, max_examples=40)
@given(
    inputs=st.integers(1, 70), outputs=st.integers(1, 40), kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3), padding=st.integers(0, 3), dilation=st.integers(1, 2), images=st.integers(1, 37),
    height=st.integers(7, 20), width=st.integers(7, 35), density=st.sampled_from([0.02, 0.2, 0.6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_cover_every_place_of_any_size(
    inputs, outputs, kernel_size, stride, padding, dilation, images, height, width, density, dtype, seed
):
    torch.manual_seed(seed)
    module = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, dilation, bias=False, dtype=dtype)
    x = torch.randn(images, inputs, height, width, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps, "MANY", 0.0)
        assert_equals_dense(module, x, density, 1e-9 if dtype == torch.float64 else 1e-4)


def test_many_channels_are_read_in_several_copies():
    torch.manual_seed(0)
    module = nn.Conv2d(700, 12, 3, padding=1, bias=False, dtype=torch.float64)
    x = torch.randn(18, 700, 4, 4, dtype=torch.float64)
    for density in (0.02, 0.4):
        nn.init.normal_(module.weight)
        assert_equals_dense(module, x, density)


def test_sums_of_many_terms_stay_exact_in_float32():
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 1, bias=False)
    x = torch.rand(64, 8, 48, 48)
    mask = torch.ones_like(module.weight, dtype=torch.bool)
    plan_of(module, mask)(as_planes(x)).sum().backward()
    wanted = x.double().sum((0, 2, 3)).expand(8, 8)
    torch.testing.assert_close(module.weight.grad[..., 0, 0].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.skipif(kernel.load(torch.float64) is None, reason="no C compiler")
def test_three_threads_find_what_one_does():
    torch.manual_seed(0)
    module = nn.Conv2d(40, 30, 3, padding=1, bias=False, dtype=torch.float64)
    mask = torch.rand_like(module.weight) < 0.2
    x, before = as_planes(torch.randn(9, 40, 10, 10, dtype=torch.float64)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            direction = torch.ones(9, 30, 10, 10, dtype=torch.float64)
            found.append(gradients(plan_of(module, mask), x, module, direction))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-12)
