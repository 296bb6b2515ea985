"""What becomes of each of PyTorch's operations in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .node import Node, Pair, Shape
from .tracer import Tracer, Unsupported, places_of, planes, three


class Operations(Tracer):
    """Handlers of operations: `op_` and the operation's name."""

    def op_convolution(self, shape, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        if transposed or len(shape) not in (3, 4) or shape[0] != 1:
            raise Unsupported("transposed and 3d convolution")
        weight = weight if len(shape) == 4 else weight[:, :, None]
        node, _ = self.laid_out(x, [1])
        if node.shape != planes(x.shape):
            raise Unsupported(f"a change of shape to {tuple(x.shape)}")
        return self.append(
            "conv",
            (node,),
            planes(shape),
            weight=_numpy(weight),
            bias=_numpy(bias),
            kernel=tuple(weight.shape[2:]),
            stride=_pair(stride, 1),
            padding=_pair(padding, 0),
            dilation=_pair(dilation, 1),
            groups=groups,
        ), places_of(shape)

    def op_mm(self, shape, x, weight, bias=None):
        if self.depends(weight):
            return self.op_bmm(shape, x[None], weight[None])
        if not self.depends(x):
            raise Unsupported("products of a constant and an activation")
        weight = weight.t()[:, :, None, None].contiguous()
        node, _ = self.laid_out(x, [1])
        made = self.append("conv", (node,), (shape[1], *node.shape[1:]), weight=_numpy(weight), bias=_numpy(bias))
        return made, places_of((shape[1], shape[0])).t()

    def op_addmm(self, shape, bias, x, weight, *, beta=1, alpha=1):
        if self.depends(bias) or (beta, alpha) != (1, 1):
            raise Unsupported("addmm of activations")
        return self.op_mm(shape, x, weight, bias.expand(shape[1]))

    def op_bmm(self, shape, a, b):
        """Products of matrices for each batch, as in attention: rows are positions, batch and columns channels."""
        if not (self.depends(a) and self.depends(b)):
            raise Unsupported("products of a batch of activations and constants")
        batch, rows, inner = a.shape
        node, _ = self.laid_out(a, [0, 2])
        value = self.value(b)
        index = value.places.transpose(1, 2).reshape(-1, inner)  # [batch * columns, inner]
        made = self.append("dot", (node, value.node), (len(index), *node.shape[1:]), index=index.numpy(), groups=batch)
        return made, places_of((batch, shape[2], rows)).transpose(1, 2)

    def op_native_batch_norm(self, shape, x, weight, bias, mean, variance, training, momentum, eps):
        if training:
            raise Unsupported("batch norm without running statistics")
        scale = (variance.double() + eps).rsqrt() * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        node, back = self.laid_out(x, [1])
        return self.append("affine", (node,), node.shape, weight=_numpy(scale), bias=_numpy(shift)), back

    def op_native_layer_norm(self, shape, x, normalized, weight, bias, eps):
        if len(normalized) != 1:
            raise Unsupported("layer norm over more than one axis")
        node, back = self.laid_out(x, [-1])
        if node.shape[1:] != (1, 1) and math.prod(x.shape) == x.shape[-1]:
            raise Unsupported("layer norm over positions")
        return self.scaled(self.append("layer_norm", (node,), node.shape, eps=eps), weight, bias), back

    def op_native_group_norm(self, shape, x, weight, bias, n, channels, positions, groups, eps):
        node, back = self.laid_out(x, [1])
        made = self.append("group_norm", (node,), node.shape, groups=groups, eps=eps)
        return self.scaled(made, weight, bias), back

    def scaled(self, node: Node, weight: Tensor | None, bias: Tensor | None) -> Node:
        """A node times numbers plus numbers, one a channel."""
        if weight is None and bias is None:
            return node
        weight = torch.ones(node.shape[0]) if weight is None else weight
        bias = torch.zeros(node.shape[0]) if bias is None else bias
        return self.append("affine", (node,), node.shape, weight=_numpy(weight.double()), bias=_numpy(bias.double()))

    # ------------------------------------------------------------------ number by number

    def map(self, function: str, x: Tensor) -> tuple[Node, Tensor]:
        node, index = self.whole(x)
        return self.append("map", (node,), node.shape, function=function), index

    def op_gelu(self, shape, x, *, approximate="none"):
        return self.map("gelu_tanh" if approximate == "tanh" else "gelu", x)

    def op_relu(self, shape, x):
        node, index = self.whole(x)
        return self.append("relu", (node,), node.shape), index

    def op_clamp(self, shape, x, min=None, max=None):
        if min == 0 and max == 6:
            return self.map("relu6", x)
        if min != 0 or max is not None:
            raise Unsupported("clamp other than at 0 from below, or between 0 and 6")
        return self.op_relu(shape, x)

    op_clamp_min = op_hardtanh = op_clamp

    def op_add(self, shape, a, b, *, alpha=1):
        if not (self.depends(a) and self.depends(b)):
            return self.affine(shape, a, 1, b, alpha) if self.depends(a) else self.affine(shape, b, alpha, a, 1)
        return self.of_two("add", shape, a, b, alpha)

    def op_sub(self, shape, a, b, *, alpha=1):
        return self.op_add(shape, a, b, alpha=-alpha)

    def op_mul(self, shape, a, b):
        if self.depends(a) and self.depends(b):
            return self.of_two("mul", shape, a, b)
        return self.affine(shape, a, b, 0, 1) if self.depends(a) else self.affine(shape, b, a, 0, 1)

    def op_div(self, shape, a, b):
        if self.depends(b):
            raise Unsupported("division by an activation")
        return self.affine(shape, a, 1 / b, 0, 1)

    def op_neg(self, shape, x):
        return self.affine(shape, x, -1, 0, 1)

    def of_two(self, op: str, shape, a: Tensor, b: Tensor, alpha: float = 1) -> tuple[Node, Tensor]:
        """a + alpha b, or a b, of activations of which one may be broadcast to the other's shape."""
        flipped = a.shape != shape and b.shape == shape
        first, second = (b, a) if flipped else (a, b)
        if first.shape != shape:
            raise Unsupported("broadcasting of both activations")
        node, index = self.whole(first)
        other = self.like(second, node, index)
        pair = [node, other]
        if alpha != 1:
            ones = np.ones(node.shape[0])
            which = 0 if flipped else 1
            pair[which] = self.append("affine", (pair[which],), node.shape, weight=alpha * ones, bias=0 * ones)
        return self.append(op, (pair[0], pair[1]), node.shape), index

    def affine(self, shape, x, scale, shift, factor) -> tuple[Node, Tensor]:
        """scale * x + factor * shift, `scale` and `shift` constants that may differ from number to number."""
        if x.shape != shape:
            raise Unsupported("broadcasting of activations")
        node, index = self.whole(x)
        weight = self.by_channel(scale, node.shape, index)
        bias = self.by_channel(shift, node.shape, index)
        if weight is None:
            node = self.append("mul", (node, self.constant(scale, node.shape, index)), node.shape)
            weight = np.ones(node.shape[0])
        if bias is None:
            late = self.constant(torch.as_tensor(shift, dtype=torch.float64) * factor, node.shape, index)
            bias = np.zeros(node.shape[0])
        else:
            late = None
        if late is None or (weight != 1).any():
            node = self.append("affine", (node,), node.shape, weight=weight, bias=bias * factor)
        return (node if late is None else self.append("add", (node, late), node.shape)), index

    def by_channel(self, value: float | Tensor, shape: Shape, index: Tensor) -> np.ndarray | None:
        """A constant as one number a channel; None where it has more."""
        full = torch.empty(math.prod(shape), dtype=torch.float64)
        full[index.flatten()] = torch.as_tensor(value, dtype=torch.float64).expand(index.shape).flatten()
        full = full.view(shape[0], -1)
        return full[:, 0].numpy() if bool((full == full[:, :1]).all()) else None

    # ------------------------------------------------------------------ over several numbers

    def op_softmax(self, shape, x, dim, half_to_float=False, op="softmax"):
        axes = self.channel_axes(x)
        dim %= x.dim()
        if x.shape[dim] > 1 and dim not in axes:
            raise Unsupported("softmax over positions")
        groups = [axis for axis in axes if axis != dim]
        node, back = self.laid_out(x, [*groups, dim])
        return self.append(op, (node,), node.shape, groups=math.prod(x.shape[a] for a in groups)), back

    op_safe_softmax = op_softmax

    def op_log_softmax(self, shape, x, dim, half_to_float=False):
        return self.op_softmax(shape, x, dim, op="log_softmax")

    def op_max_pool2d_with_indices(self, shape, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
        return self.append(
            "max_pool",
            (self.image(x),),
            planes(shape),
            kernel=_pair(kernel, 1),
            stride=_pair(stride or kernel, 1),
            padding=_pair(padding, 0),
            dilation=_pair(dilation, 1),
        ), places_of(shape)

    def op_avg_pool2d(
        self, shape, x, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        kernel, stride, padding = _pair(kernel, 1), _pair(stride or kernel, 1), _pair(padding, 0)
        reach = [(n - 1) * s + k - 2 * p for n, s, k, p in zip(shape[-2:], stride, kernel, padding, strict=True)]
        if divisor_override or (any(padding) and not count_include_pad) or any(np.greater(reach, x.shape[-2:])):
            raise Unsupported("average pooling that leaves padding or overhang out of the count")
        node = self.append("avg_pool", (self.image(x),), planes(shape), kernel=kernel, stride=stride, padding=padding)
        return node, places_of(shape)

    def op_adaptive_avg_pool2d(self, shape, x, size):
        return self.adaptive("avg_pool", self.image(x), planes(shape)), places_of(shape)

    def op_adaptive_max_pool2d(self, shape, x, size):
        return self.adaptive("max_pool", self.image(x), planes(shape)), places_of(shape)

    def op_mean(self, shape, x, dims, keepdim=False, dtype=None):
        dims = {dim % x.dim() for dim in dims}
        if dims & set(self.channel_axes(x)):
            raise Unsupported("a mean over channels")
        node, _ = self.laid_out(x, [axis for axis in range(x.dim()) if axis not in dims])
        return self.adaptive("avg_pool", node, (node.shape[0], 1, 1)), torch.arange(node.shape[0])

    def adaptive(self, op: str, node: Node, shape: Shape) -> Node:
        if any(np.mod(node.shape[1:], shape[1:])):
            raise Unsupported(f"adaptive pooling of {node.shape[1:]} to {shape[1:]}")
        kernel = tuple(n // m for n, m in zip(node.shape[1:], shape[1:], strict=True))
        return self.append(op, (node,), shape, kernel=kernel, stride=kernel)

    def image(self, x: Tensor) -> Node:
        """A node of channels by height and width."""
        node, _ = self.laid_out(x, [1 if x.dim() > 3 or x.shape[0] == 1 else 0])
        if node.shape != planes(x.shape if x.shape[0] == 1 else (1, *x.shape)):
            raise Unsupported(f"a change of shape to {tuple(x.shape)}")
        return node

    def op_as_strided(self, shape, x, size, stride, offset=None):
        if x.numel() != max(x.shape) or x.numel() != math.prod(shape):  # a pool's result, in another memory format
            raise Unsupported("as_strided")
        value = self.value(x)
        return value.node, value.places

    def op_upsample_nearest2d(self, shape, x, *args, **kwargs):
        value = self.value(x)
        if any(np.mod(shape[2:], x.shape[2:])):
            raise Unsupported("upsampling by other than whole factors")
        index = value.places
        for axis in (2, 3):
            index = index.repeat_interleave(shape[axis] // x.shape[axis], axis)
        return value.node, index

    # ------------------------------------------------------------------ joining

    def op_cat(self, shape, tensors, dim=0):
        dim %= len(shape)
        tensors = [tensor for tensor in tensors if tensor.numel()]
        found = [tensor for tensor in tensors if self.depends(tensor)]
        if all(dim in self.channel_axes(tensor) or tensor.shape[dim] == 1 for tensor in found) and len(shape) > 1:
            axes = [dim] if all(self.channel_axes(t) in ([], [dim]) for t in found) else None
            if axes is not None:
                parts = [self.part(tensor, dim) for tensor in tensors]
                if len({node.shape[1:] for node in parts}) == 1:
                    channels, *space = sum(node.shape[0] for node in parts), *parts[0].shape[1:]
                    made = self.append("cat", tuple(parts), three((channels, *space)))
                    order = [dim, *(axis for axis in range(len(shape)) if axis != dim)]
                    turned = places_of([shape[axis] for axis in order])
                    return made, turned.permute([order.index(axis) for axis in range(len(shape))])
        return self.joined(shape, tensors, dim)

    def part(self, tensor: Tensor, dim: int) -> Node:
        """A tensor with its channels along `dim`."""
        if self.depends(tensor):
            return self.laid_out(tensor, [dim])[0]
        turned = tensor.movedim(dim, 0)
        return self.append("constant", (), planes((1, *turned.squeeze(1).shape)), weight=turned.double().numpy())

    def joined(self, shape, tensors, dim) -> tuple[Node, Tensor]:
        """Positions one after the other, as a class token before others: each part with zeros where the others are."""
        axes = sorted({axis for tensor in tensors if self.depends(tensor) for axis in self.channel_axes(tensor)})
        if dim in axes or not axes:
            raise Unsupported("concatenation of this kind")
        others = [axis for axis in range(len(shape)) if axis not in axes]
        order = [*axes, *others]
        channels, count = math.prod(shape[a] for a in axes), math.prod(shape[a] for a in others)
        back = places_of([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
        start, total = 0, None
        for tensor in tensors:
            places = back.narrow(dim, start, tensor.shape[dim])
            start += tensor.shape[dim]
            if self.depends(tensor):
                value = self.value(tensor)
                at = torch.full((channels * count,), -1)
                at[places.flatten()] = value.places.flatten()
                node = self.append(
                    "pick", (value.node,), (channels, 1, count), index=at.view(channels, 1, count).numpy()
                )
            else:
                values = torch.zeros(channels * count, dtype=torch.float64)
                values[places.flatten()] = tensor.double().flatten()
                node = self.append("constant", (), (channels, 1, count), weight=values.view(channels, 1, count).numpy())
            total = node if total is None else self.append("add", (total, node), node.shape)
        assert total is not None
        return total, back


def _function(name: str):
    return lambda self, shape, x: self.map(name, x)


for _name in ("sigmoid", "silu", "hardswish", "hardsigmoid", "tanh", "relu6"):
    setattr(Operations, f"op_{_name}", _function(_name))


def _pair(value: int | Sequence[int], line: int) -> Pair:
    """Height's and width's; `line` is the height's where there is no height, which is in 1d convolutions only."""
    if isinstance(value, int):
        return value, value
    return (line, value[0]) if len(value) == 1 else (value[0], value[1])


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy()
