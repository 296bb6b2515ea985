"""Dense weight gradients from a sparse pass: what a gradient-growth rule scores, on the step before an update.

A convolution's weight gradient needs the activations of all its inputs and the gradients of all its outputs. Both are
known from a sparse pass whose activations are `Split`: what no active weight touches is a constant of the network, or
of an image, and so is its gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..plugins.transform.sharing import scale_of
from .fused import read
from .layers import LayerPlan, NormPlan, Sink
from .split import Channels, Split
from .taps import planes, supported


def gradient_plans(
    plans: Mapping[nn.Module, LayerPlan | NormPlan], kept: Mapping[nn.Module, tuple[Tensor, ...]], per_image: bool
) -> dict[nn.Module, Any]:
    """Plans that give the dense gradients of all weights, from those of a sparse pass and the kept channels of each
    layer (inputs, outputs) and norm. Linear layers have none: they read all channels, and are dense."""
    return {
        module: GradientPlan(plan, *kept[module], per_image) if isinstance(module, nn.Conv2d) else plan
        for module, plan in plans.items()
        if not isinstance(module, nn.Linear)
    }


class GradientPlan:
    """As a `LayerPlan` of an `nn.Conv2d` without groups, with the dense gradient of its weight.

    Args:
        plan: the plan for its active weights.
        inputs, outputs: the channels that the input has and that the output gets; int64, ascending.
        per_image: whether other channels may depend on the image, and on them the loss, as DyReLU's context does.

    Raises `NotImplementedError`, when called, where an input has not the channels that it should.
    """

    def __init__(self, plan: LayerPlan, inputs: Tensor, outputs: Tensor, per_image: bool):
        self.plan, self.sink, self.per_image = copy.copy(plan), plan.sink, per_image
        self.plan.split = None
        self.module = plan.module
        device = plan.module.weight.device
        self.inputs = Channels.of(inputs, plan.module.in_channels, device)
        self.outputs = Channels.of(outputs, plan.module.out_channels, device, whole=True)

    def __call__(self, x: Any) -> Tensor | Split:
        x = read(x)
        kept, constants = (x.kept, x.rest[..., 0, 0].detach()) if isinstance(x, Split) else (x, x.new_zeros(1, 0))
        if kept.shape[1] != len(self.inputs.kept) or constants.shape[1] != len(self.inputs.rest):
            raise NotImplementedError("an input with other channels than the wiring says")
        if not supported(self.module, kept) or self.module.groups > 1:
            raise NotImplementedError("a convolution in groups, or without a kernel")
        dense = DenseGradient(self, kept.detach(), constants)
        y = self.plan.begun(kept, dense)
        if not (self.per_image or len(self.outputs.rest)):
            return y
        images = len(kept) if self.per_image else 1
        rest = kept.new_zeros(images, len(self.outputs.rest), 1, 1, dtype=y.dtype, requires_grad=True)
        if self.per_image:
            rest = rest.clone()
            if rest.requires_grad:
                rest.register_hook(dense.from_rest)
        if self.module.bias is not None:
            rest = rest + self.module.bias[self.outputs.rest].view(-1, 1, 1)
        return Split(y, rest, self.outputs)

    def add(self, rows: Tensor, columns: Tensor, gradient: Tensor) -> None:
        """Add to a block of the weight's gradient."""
        if (scale := scale_of(self.module)) is not None:
            gradient = gradient * scale.detach()
        self.sink.add_dense(rows, columns, gradient)

    def alone(self) -> GradientPlan:
        """As `LayerPlan.alone`."""
        plan = copy.copy(self)
        plan.plan = self.plan.alone()
        return plan

    def apart(self, leaves: Mapping[int, Tensor], sinks: dict[int, Sink]) -> GradientPlan:
        """As `LayerPlan.apart`."""
        plan = copy.copy(self)
        plan.plan = self.plan.apart(leaves, sinks)
        plan.sink = plan.plan.sink
        return plan


class DenseGradient:
    """The weight's gradient as a sum of four blocks: of kept and other outputs, times kept and other inputs."""

    def __init__(self, plan: GradientPlan, x: Tensor, constants: Tensor):
        self.plan, self.x, self.constants = plan, x, constants
        geometry = plan.plan.taps.geometry(*x.shape[2:])
        axes = geometry.rows, geometry.columns
        self.written = [(axis.forward >= 0).to(x.dtype) for axis in axes]  # [kernel, output places]: inside the input?
        self.read = [(axis.backward >= 0).to(x.dtype) for axis in axes]  # [kernel, input places]: read for an output?

    @torch.no_grad()
    def from_kept(self, grad: Tensor) -> None:
        plan, grad = self.plan, grad.to(self.x.dtype)
        plan.add(plan.outputs.kept, plan.inputs.kept, _correlation(plan.module, self.x, grad))
        if self.constants.numel():
            sums = _sums(grad, *self.written)
            gradient = torch.einsum("ohwn,ni->oihw", sums, self.constants.expand(len(grad), -1).to(sums.dtype))
            plan.add(plan.outputs.kept, plan.inputs.rest, gradient)

    @torch.no_grad()
    def from_rest(self, grad: Tensor) -> None:
        """`grad` [N, outputs, 1, 1] is the sum over positions, which all have the same."""
        plan, (rows, columns) = self.plan, self.written
        grad = grad[..., 0, 0].to(self.x.dtype) / (rows.shape[1] * columns.shape[1])
        gradient = torch.einsum("no,ihwn->oihw", grad, _sums(self.x, *self.read))
        plan.add(plan.outputs.rest, plan.inputs.kept, gradient)
        if self.constants.numel():
            products = grad.T @ self.constants.expand(len(grad), -1).to(grad.dtype)
            gradient = products[..., None, None] * rows.sum(1)[:, None] * columns.sum(1)
            plan.add(plan.outputs.rest, plan.inputs.rest, gradient)


def _correlation(module: nn.Conv2d, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a dense weight [outputs, inputs, ...] from [N, inputs, H, W] and [N, outputs, H', W']."""
    if module.kernel_size == (1, 1) and module.padding == (0, 0):
        rows, columns = module.stride
        read = planes(x)[:, ::rows, ::columns].flatten(1)
        return (planes(grad).flatten(1) @ read.T)[..., None, None]
    shape = (grad.shape[1], x.shape[1], *module.kernel_size)
    x, grad = x.contiguous(), grad.contiguous()
    return conv2d_weight(x, shape, grad, module.stride, module.padding, module.dilation)


def _sums(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums of [N, C, H, W] over the places that `rows` [k, H] and `columns` [l, W] choose; [C, k, l, N]."""
    x = planes(x)
    over_rows = (rows @ x.flatten(2)).view(len(x), len(rows), *x.shape[2:])
    return columns @ over_rows
