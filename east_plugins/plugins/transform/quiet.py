"""Residual branches that begin silent: the scale of the norm that ends each of them starts at zero.

The network then starts as its shortest path and takes its blocks in one by one, which makes a start of few weights far
easier to train (zero-init of Goyal et al. 2017, Section 5.1; ReZero, Bachlechner et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import NothingMatchedError, UsageError
from ...ops.channels import trace
from ...ops.maskable import maskable
from ...ops.paths import plain_evaluation
from ..allocation.position import places

BRANCHES = ("all", "loops")


def quiet(model: nn.Module, input_shape: Sequence[int], branches: str = "all") -> list[str]:
    """Set the scales that `quiet_scales` finds to zero; returns the norms' names."""
    scales = quiet_scales(model, input_shape, branches)
    silence(scales)
    return [name.removesuffix(".weight") for name in scales]


@torch.no_grad()
def silence(scales: Mapping[str, nn.Parameter]) -> None:
    """Set them to zero."""
    for scale in scales.values():
        scale.zero_()


def quiet_scales(model: nn.Module, input_shape: Sequence[int], branches: str = "all") -> dict[str, nn.Parameter]:
    """The scales of the batch norms at the end of residual branches, by name; the model is left as it was.

    Args:
        branches: `loops`: of blocks that begin and end in one stream; `all`: of those beside a projection as well.

    A norm whose scale would get no gradient at zero, as one with a ReLU behind it, is none of them. Raises
    `NothingMatchedError` where there is no such branch, `UsageError` for another `branches`.
    """
    if branches not in BRANCHES:
        raise UsageError(f"`quiet_branches` must be one of {', '.join(BRANCHES)}, got {branches!r}")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.weight is not None}
    shapes = {name: weight.shape for name, weight in maskable(model).items()}
    wiring, where = trace(model, shapes, input_shape, norms), places(model, shapes, input_shape)
    opened = [wiring.layers[name].targets for name, place in where.items() if place.beside]
    found = {}
    for norm, layer in wiring.added.items():
        targets, place = wiring.layers[layer].targets, where[layer]
        opens = branches == "all" and any(torch.equal(targets, other) for other in opened) and not place.beside
        if place.block or opens:
            found[norm] = norms[norm]
    scales = {f"{name}.weight": norm.weight for name, norm in found.items()}
    heard = {name: scales[name] for name in _heard(model, scales, input_shape)}
    if not heard:
        raise NothingMatchedError("`quiet_branches`: the model has no residual branch that ends with a batch norm")
    return heard


def _heard(model: nn.Module, scales: dict[str, nn.Parameter], input_shape: Sequence[int]) -> list[str]:
    """The scales that get a gradient where all of them are zero."""
    if not scales:
        return []
    zeros: dict[str, Tensor] = {n: torch.zeros_like(scale).requires_grad_() for n, scale in scales.items()}
    like = next(iter(scales.values()))
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    with plain_evaluation(model), torch.enable_grad(), torch.random.fork_rng([]):
        output = torch.func.functional_call(model, zeros, (x,))
        gradients = torch.autograd.grad(output.square().sum(), list(zeros.values()), allow_unused=True)
    return [n for n, gradient in zip(zeros, gradients, strict=True) if gradient is not None and bool(gradient.any())]
