"""Convolution by taps and batch norm of planes against PyTorch's own, in float64 and float32."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins.ops.active import Active
from east_plugins.sparse import kernel
from east_plugins.sparse.layers import LayerPlan, NormPlan, Sink
from east_plugins.sparse.norm import normalise_with
from east_plugins.sparse.taps import in_planes

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def as_planes(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def close(a, b, dtype):
    scale = max(1.0, b.detach().abs().max().item())
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def plan_of(module, mask):
    channels = torch.arange(module.in_channels), torch.arange(module.out_channels)
    return LayerPlan(module, Sink(module.weight, Active(mask)), *channels)


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 3), outputs=st.integers(1, 3), groups=st.sampled_from([1, 2]), kernel_size=st.integers(1, 4),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), images=st.integers(1, 67),
    height=st.integers(7, 9), width=st.integers(7, 10), density=st.floats(0, 1), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_taps_equal_the_dense_convolution_and_its_gradients(
    inputs, outputs, groups, kernel_size, stride, padding, dilation, images, height, width, density, bias, dtype, seed
):
    torch.manual_seed(seed)
    module = nn.Conv2d(
        inputs * groups, outputs * groups, kernel_size, stride, padding, dilation, groups, bias, dtype=dtype
    )
    mask = torch.rand_like(module.weight) < density
    with torch.no_grad():
        module.weight.mul_(mask)
    x = torch.randn(images, inputs * groups, height, width, dtype=dtype)
    dense_x, sparse_x = x.clone().requires_grad_(), as_planes(x).requires_grad_()
    dense = module(dense_x)
    direction = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * direction).sum(), [dense_x, *module.parameters()])
    sparse = plan_of(module, mask)(sparse_x)
    assert in_planes(sparse)
    close(sparse, dense, dtype)
    (sparse * direction).sum().backward()
    close(sparse_x.grad, expected[0], dtype)
    close(module.weight.grad, expected[1] * mask, dtype)
    if bias:
        close(module.bias.grad, expected[2], dtype)


def test_without_a_compiler_the_same_comes_out(monkeypatch, caplog):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    mask = torch.rand_like(module.weight) < 0.3
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    with_taps = plan_of(module, mask)(x)
    monkeypatch.setenv("CC", "a-compiler-that-is-not-there")
    kernel.load.cache_clear()
    try:
        assert kernel.load(torch.float64) is None
        assert "a-compiler-that-is-not-there" in caplog.text and "plain PyTorch" in caplog.text
        torch.testing.assert_close(plan_of(module, mask)(x), with_taps)
    finally:
        monkeypatch.undo()
        kernel.load.cache_clear()


@pytest.mark.parametrize("padding_mode, padding", [("reflect", 1), ("circular", 1), ("zeros", "same")])
def test_paddings_without_taps_are_convolved_compactly(padding_mode, padding):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=padding_mode, dtype=torch.float64)
    mask = torch.rand_like(module.weight) < 0.3
    with torch.no_grad():
        module.weight.mul_(mask)
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plan_of(module, mask)(x), module(x))


@settings(deadline=None, max_examples=100)
@given(
    channels=st.integers(1, 5), images=st.integers(2, 70), side=st.integers(1, 12), affine=st.booleans(),
    offset=st.sampled_from([0.0, 1e3]), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_norm_equals_pytorchs_and_its_gradients(channels, images, side, affine, offset, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(images, channels, side, side, dtype=torch.float64) + offset
    direction = torch.randn_like(x)
    weight, bias = torch.randn(2, channels, dtype=torch.float64) if affine else (None, None)
    exact = [t if t is None else t.detach().to(dtype).double().requires_grad_() for t in (x, weight, bias)]
    running = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    expected = F.batch_norm(exact[0], *running, *exact[1:], True, 1.0, 1e-5)
    (expected * direction.to(dtype).double()).sum().backward()
    module = nn.BatchNorm2d(channels, momentum=1.0, affine=affine, dtype=dtype)
    ours = [as_planes(x).to(dtype).requires_grad_(), module.weight, module.bias]
    if affine:
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    y = NormPlan(module, torch.arange(channels))(ours[0])
    (y * direction.to(dtype)).sum().backward()
    mean, variance = module.running_mean, module.running_var
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3 if offset else 1e-4
    for got, want in [(y, expected), (mean, running[0]), (variance, running[1])]:
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for got, want in zip(ours, exact, strict=True):
        if got is not None:
            scale = max(1.0, float(want.grad.abs().max()))
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=tolerance * scale)
    fixed = normalise_with(ours[0], mean, variance, *ours[1:], 1e-5)
    assert in_planes(fixed)
    reference = F.batch_norm(exact[0], *running, *exact[1:], False, 0.0, 1e-5)
    torch.testing.assert_close(fixed.double(), reference, rtol=tolerance, atol=tolerance * (1 + offset))
