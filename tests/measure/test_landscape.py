"""Signs, lines and curvature of a loss against direct computations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from east_plugins.measure import landscape
from east_plugins.training.images import Images


def small(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def pictures(count=24):
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 2, 2), dtype=torch.uint8, generator=draw)
    labels = torch.randint(3, (count,), generator=draw)

    class Doubled(Images):
        def batches(self, *args):
            return ((x.double(), y) for x, y in super().batches(*args))

    return Doubled(labels, torch.full((1, 1, 1), 128.0), torch.full((1, 1, 1), 70.0), images)


def hessian(model, masks, x, y, loss):
    """Explicit, over active weights and parameters without a mask."""
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])

    def value(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        named = {n: part.view(shape) for n, part, shape in zip(parameters, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, named, (x,)), y)

    full = torch.autograd.functional.hessian(value, flat)
    kept = torch.cat([masks.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in parameters.items()])
    return full[kept][:, kept]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("sign", [1, -1], ids=["loss", "minus the loss"])
def test_the_largest_eigenvalue_is_that_of_the_explicit_hessian(sign, masked, norm):
    model = small(norm=norm).eval()
    masks = {"1.weight": torch.rand(5, 4) < 0.5} if masked else {}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    batches = list(pictures().batches(10))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))

    def loss(output, target):
        return sign * F.cross_entropy(output, target)

    exact = torch.linalg.eigvalsh(hessian(model, masks, x, y, loss))
    found = landscape.largest_eigenvalue(model, masks, batches, loss, iterations=3000, tolerance=1e-11)
    assert (sign > 0) == (abs(exact[-1]) > abs(exact[0]))  # minus the loss: the largest is not the one of largest size
    assert found == pytest.approx(float(exact[-1]), rel=1e-4, abs=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_a_line_ends_at_the_losses_of_its_ends_and_a_quadratic_has_no_barrier():
    a, b, images = small(1), small(2), pictures()
    model = small(3)
    (losses,) = landscape.line(model, (a.state_dict(), b.state_dict()), (images,), points=5)
    for end, value in ((a, losses[0]), (b, losses[-1])):
        x, y = next(iter(images.batches(1000)))
        assert value == pytest.approx(float(F.cross_entropy(end(x), y).detach()))
    assert landscape.barrier([1.0, 2.0, 3.0]) == 0 and landscape.barrier([1.0, 4.0, 3.0]) == 2
    assert landscape.barrier([9.0, 4.0, 1.0]) == 0
    untouched = small(3).state_dict()
    assert all(torch.equal(v, untouched[n]) for n, v in model.state_dict().items())


def test_statistics_of_norms_are_measured_anew_between_the_ends():
    a, b, images = small(1, norm=True), small(2, norm=True), pictures()
    probe = small(3, norm=True)
    probe.load_state_dict({n: (v + b.state_dict()[n]) / 2 if v.is_floating_point() else v
                           for n, v in a.state_dict().items()})  # fmt: skip
    landscape.measure_statistics(probe, images)
    x, _ = next(iter(images.batches(1000)))
    inside = probe[1](probe[0](x))
    torch.testing.assert_close(probe[2].running_mean, inside.mean(0))
    torch.testing.assert_close(probe[2].running_var, inside.var(0))
    assert probe[2].momentum == 0.1
    (losses,) = landscape.line(a, (a.state_dict(), b.state_dict()), (images,), images, points=3)
    assert losses[1] == pytest.approx(landscape.mean_loss(probe, images))


def test_sign_flips_are_counted_among_weights_active_in_both():
    before = {"w": torch.tensor([1.0, -1.0, 2.0, 0.0, -3.0])}
    after = {"w": torch.tensor([-1.0, -2.0, -2.0, 1.0, 3.0])}
    masks = {"w": torch.tensor([True, True, False, True, True])}, {"w": torch.tensor([True, True, True, True, False])}
    assert landscape.sign_flips(before, after, masks) == (2, 3)
