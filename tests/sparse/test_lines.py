"""What the engine computes of DyReLU in one pass: its formula, value and gradient."""

import pytest
import torch

from east_plugins.sparse import kernel
from east_plugins.sparse.lines import max_of_lines, position_mean
from east_plugins.sparse.taps import in_planes

SIZES = [(5, 3, 4, 6), (130, 2, 7, 5), (300, 1, 9, 9)]  # images below and above what the kernel takes at a time


def make(size, channels, dtype=torch.float64):
    n, c, h, w = size
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(c, h, w, n, generator=generator, dtype=dtype).permute(3, 0, 1, 2).requires_grad_()
    shape = (n, c if channels else 1, 1, 1)
    return x, [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(4)]


def formula(x, a1, b1, a2, b2):
    return torch.maximum(a1 * x + b1, a2 * x + b2)


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients_are_the_formulas(size, channels):
    x, coefficients = make(size, channels)
    ours, theirs = max_of_lines(x, *coefficients), formula(x, *coefficients)
    assert type(ours.grad_fn) is not type(theirs.grad_fn), "the kernel computed it"
    assert in_planes(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(theirs)
    for found, wanted in zip(
        torch.autograd.grad(ours, [x, *coefficients], towards),
        torch.autograd.grad(theirs, [x, *coefficients], towards),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_where_the_lines_meet_each_gets_half():
    x = torch.zeros(2, 3, 3, 4, dtype=torch.float64).permute(3, 0, 1, 2).requires_grad_()
    coefficients = [torch.full((4, 2, 1, 1), value, dtype=torch.float64, requires_grad=True) for value in (3, 1, 1, 1)]
    max_of_lines(x, *coefficients).sum().backward()
    assert bool((x.grad == 2).all())
    assert [float(t.grad.unique()) for t in coefficients] == [0, 4.5, 0, 4.5]


@pytest.mark.parametrize("size", SIZES)
def test_means_over_positions(size):
    x, _ = make(size, True)
    ours, theirs = position_mean(x), x.mean((2, 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(mean, x, towards)[0] for mean in (ours, theirs)))


def test_other_layouts_and_dtypes_are_computed_by_pytorch(monkeypatch):
    monkeypatch.setattr(kernel, "load", lambda dtype: pytest.fail("no kernel is wanted"))
    x, coefficients = make((4, 3, 5, 5), True)
    plain = x.detach().contiguous()
    torch.testing.assert_close(max_of_lines(plain, *coefficients), formula(plain, *coefficients))
    torch.testing.assert_close(position_mean(plain), plain.mean((2, 3)))
    half, few = make((4, 3, 5, 5), True, torch.bfloat16)
    exact = formula(half.float(), *(t.float() for t in few)).bfloat16()
    torch.testing.assert_close(max_of_lines(half, *few), exact, rtol=0.016, atol=0.01)
