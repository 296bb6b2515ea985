"""The loss around and between networks: signs that flipped, the straight line, the largest curvature (Gadhikar et al.
2024, Figures 2 and 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.modes import training_mode
from ..training.images import ImageFiles, Images

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def sign_flips(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], masks: Sequence[Mapping[str, Tensor]]
) -> tuple[int, int]:
    """Weights active in both of two networks whose sign changed (to or from zero counts), and how many are active in
    both. `before` and `after` are weights by name, `masks` the two networks' masks."""
    flipped = both = 0
    for name, mask in masks[0].items():
        common = mask & masks[1][name]
        both += int(common.sum())
        flipped += int((before[name].sign() != after[name].sign())[common].sum())
    return flipped, both


def line(
    model: nn.Module,
    ends: Sequence[Mapping[str, Tensor]],
    images: Sequence[Images | ImageFiles],
    statistics: Images | ImageFiles | None = None,
    points: int = 11,
    loss: Loss = F.cross_entropy,
) -> list[list[float]]:
    """Mean loss on each set of `images` at `points` networks on the straight line between two state dicts, ends
    included (linear mode connectivity, Frankle et al. 2020).

    Running statistics of norms are not those of a network in between: where `statistics` are given, they are measured
    anew on these images at every point, the ends included. The model is left as it was.
    """
    probe, found = copy.deepcopy(model), []
    for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        probe.load_state_dict(
            {n: torch.lerp(a, ends[1][n], t) if a.is_floating_point() else a for n, a in ends[0].items()}
        )
        if statistics is not None:
            measure_statistics(probe, statistics)
        found.append([mean_loss(probe, each, loss) for each in images])
    return [list(each) for each in zip(*found, strict=True)]


def barrier(losses: Sequence[float]) -> float:
    """How far the loss on a line rises over the straight line between its ends, at most; 0 where it does not."""
    steps = len(losses) - 1
    return max(loss - losses[0] - (losses[-1] - losses[0]) * i / steps for i, loss in enumerate(losses))


@torch.no_grad()
def mean_loss(model: nn.Module, images: Images | ImageFiles, loss: Loss = F.cross_entropy) -> float:
    """Mean loss over all images, in evaluation mode."""
    total = 0.0
    with training_mode(model, False):
        for x, y in images.batches(1000):
            total += float(loss(model(x), y)) * len(y)
    return total / len(images)


@torch.no_grad()
def measure_statistics(model: nn.Module, images: Images | ImageFiles, batch_size: int = 256) -> None:
    """Set running means and variances of batch norms to their averages over the images' batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all
    with training_mode(model, True):
        for x, _ in images.batches(batch_size):
            if len(x) > 1:
                model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def largest_eigenvalue(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Sequence[Batch],
    loss: Loss = F.cross_entropy,
    iterations: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The largest eigenvalue of the Hessian of the mean loss over the batches, in the active weights and all trained
    parameters that have no mask, in evaluation mode; by power iteration.

    Power iteration finds the eigenvalue of largest size; where that is negative, a second one on the Hessian less it
    finds the largest. Each ends when an estimate changes by less than `tolerance` of itself, or after `iterations`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shown = {name: masks[name].to(p.dtype) if name in masks else None for name, p in parameters.items()}
    total = sum(len(y) for _, y in batches)

    def product(vector: list[Tensor]) -> list[Tensor]:
        found = [torch.zeros_like(v) for v in vector]
        with training_mode(model, False):
            for x, y in batches:
                leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
                value = loss(functional_call(model, leaves, (x,)), y) * (len(y) / total)
                first = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
                along = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
                if not along.requires_grad:  # linear in everything
                    continue
                second = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
                found = [f + s for f, s in zip(found, second, strict=True)]
        return [f if mask is None else f * mask for f, mask in zip(found, shown.values(), strict=True)]

    def start(generator: torch.Generator) -> list[Tensor]:
        drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters.values()]
        return [d if mask is None else d * mask for d, mask in zip(drawn, shown.values(), strict=True)]

    generator = torch.Generator().manual_seed(seed)
    dominant = _power(product, start(generator), iterations, tolerance)
    if dominant >= 0:
        return dominant

    def shifted(vector: list[Tensor]) -> list[Tensor]:
        return [f - dominant * v for f, v in zip(product(vector), vector, strict=True)]

    return dominant + _power(shifted, start(generator), iterations, tolerance)


def _power(
    product: Callable[[list[Tensor]], list[Tensor]], vector: list[Tensor], iterations: int, tolerance: float
) -> float:
    """The Rayleigh quotient of the vector that the product turns to."""
    estimate = 0.0
    for step in range(iterations):
        size = sum(float((v * v).sum()) for v in vector) ** 0.5
        if size == 0:
            return 0.0
        vector = [v / size for v in vector]
        image = product(vector)
        last, estimate = estimate, sum(float((v * w).sum()) for v, w in zip(vector, image, strict=True))
        if step and abs(estimate - last) <= tolerance * abs(estimate):
            break
        vector = image
    return estimate
