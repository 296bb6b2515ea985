"""What a network computes in evaluation, as a short list of tensor operations.

The network runs once on one input while every PyTorch operation that this input reaches is noted. What does not
depend on the input (a lent weight times its scale, a DCT matrix plus sparse weights) is a plain number by then, and
below modules and functions there are few operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..plugins.activation.phased import OFF, PhasedActivation
from ..plugins.transform.dct import DCTLayer, materialize
from .unwrapped import unwrapped

SUPPORTED = (
    "1d and 2d convolution, linear, batch norm, ReLU, max and average pooling, addition, arithmetic with constants, "
    "flatten and concatenation"
)
Pair = tuple[int, int]


@dataclass(eq=False)
class Node:
    """One operation; its result has `shape` (channels, height, width), lines height 1, vectors height and width 1.

    `op` is input, conv (also linear; `weight` of shape out, in/groups, kh, kw), affine (`weight` and `bias`, a number
    a channel), relu, add, max_pool, avg_pool (the padding's zeros counted), flatten or cat.
    """

    op: str
    name: str
    inputs: tuple[Node, ...]
    shape: tuple[int, int, int]
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias: np.ndarray | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Graph:
    """Operations in order of execution, the input first; shapes are those of the model, without the batch."""

    nodes: list[Node]
    output: Node
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def trace(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> Graph:
    """The operations of `model` with its masks applied, in evaluation mode; the model is left as it was.

    Raises `UsageError` that names the layer whose operation is not supported.
    """
    model = masked_copy(model, masks)
    x = torch.zeros(1, *input_shape)
    with torch.no_grad(), _Tracer(model, x) as tracer:
        output = model(x)
    if not isinstance(output, Tensor):
        raise UsageError(f"export needs a network that returns one tensor, got {type(output).__name__}")
    return Graph(tracer.nodes, tracer.node(output), tuple(input_shape), tuple(output.shape[1:]))


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode, in float32 on the CPU, its inactive weights zero and DCT layers made plain; of a
    wrapped model that of the network inside.

    Raises `UsageError` where activations are still being phased out, and for masks as `unwrapped`.
    """
    model, masks = unwrapped(model, masks)
    if any(isinstance(module, PhasedActivation) and module.phase != OFF for module in model.modules()):
        raise UsageError("export needs a network whose activations are phased out: train past `east_dyrelu_end`")
    model = copy.deepcopy(model).cpu().float().eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.cpu(), 0)
    if any(isinstance(module, DCTLayer) for module in model.modules()):
        materialize(model)
    return model


class _Unsupported(Exception):
    """What an operation does that cannot be exported."""


class _Tracer(TorchDispatchMode):
    """Notes a node for every operation on a tensor that depends on the input.

    A handler's name is `op_` and the operation's; it takes the shape of the result and the operation's arguments.
    `model` gets hooks, so it is a copy.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.running = [type(model).__name__]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name or self.running[0]))
            module.register_forward_hook(lambda *_: self.running.pop() and None, always_call=True)
        self.nodes: list[Node] = []
        self.values: dict[int, tuple[Tensor, Node | None]] = {}  # tensors are kept, so that no id is used twice
        self.values[id(x)] = x, self.append("input", (), x.shape)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if self.depends(leaf)]
        if not operands:
            return result
        first, *others = result if isinstance(result, tuple) else (result,)
        if all(self.values[id(operand)][1] is None for operand in operands):
            others.append(first)
        else:
            self.values[id(first)] = first, self.handle(func, first, args, kwargs)
        for other in others:  # a pool's indices, a norm's statistics: of no use to the output
            self.values[id(other)] = other, None
        return result

    def handle(self, func, result, args, kwargs) -> Node:
        name = func.overloadpacket.__name__.strip("_")
        handler = getattr(self, "op_" + name, None)
        try:
            if handler is None or not isinstance(result, Tensor):
                raise _Unsupported(name)
            return handler(result.shape, *args, **kwargs)
        except _Unsupported as error:
            raise UsageError(f"{self.running[-1]}: export does not support {error}; it does {SUPPORTED}") from None

    def depends(self, value) -> bool:
        return id(value) in self.values

    def node(self, tensor: Tensor) -> Node:
        node = self.values.get(id(tensor), (tensor, None))[1]
        if node is None:
            raise _Unsupported("what is computed here")
        return node

    def append(self, op: str, inputs: tuple[Node, ...], shape: Sequence[int], **attributes) -> Node:
        if not 2 <= len(shape) <= 4 or shape[0] != 1:
            raise _Unsupported(f"tensors of shape {tuple(shape)}")
        numbers = [attributes.get("weight"), attributes.get("bias")]
        if not all(np.isfinite(array).all() for array in numbers if array is not None):
            raise _Unsupported("weights that are infinite or no number")
        self.nodes.append(Node(op, self.running[-1], inputs, _planes(shape), **attributes))
        return self.nodes[-1]

    def op_convolution(self, shape, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        if transposed or len(shape) not in (3, 4):
            raise _Unsupported("transposed and 3d convolution")
        weight = weight if len(shape) == 4 else weight[:, :, None]
        return self.append(
            "conv",
            (self.node(x),),
            shape,
            weight=_numpy(weight),
            bias=_numpy(bias),
            kernel=tuple(weight.shape[2:]),
            stride=_pair(stride, 1),
            padding=_pair(padding, 0),
            dilation=_pair(dilation, 1),
            groups=groups,
        )

    def op_mm(self, shape, x, weight, bias=None):
        if self.depends(weight):
            raise _Unsupported("products of two activations")
        weight = weight.t()[:, :, None, None].contiguous()
        return self.append("conv", (self.node(x),), shape, weight=_numpy(weight), bias=_numpy(bias))

    def op_addmm(self, shape, bias, x, weight):
        return self.op_mm(shape, x, weight, bias.expand(shape[1]))

    def op_native_batch_norm(self, shape, x, weight, bias, mean, variance, training, momentum, eps):
        if training:
            raise _Unsupported("batch norm without running statistics")
        scale = (variance.double() + eps).rsqrt() * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        return self.append("affine", (self.node(x),), shape, weight=_numpy(scale), bias=_numpy(shift))

    def op_relu(self, shape, x):
        return self.append("relu", (self.node(x),), shape)

    def op_clamp(self, shape, x, min=None, max=None):
        if min != 0 or max is not None:
            raise _Unsupported("clamp other than at 0 from below")
        return self.op_relu(shape, x)

    op_clamp_min = op_clamp

    def op_add(self, shape, a, b, *, alpha=1):
        if not (self.depends(a) and self.depends(b)):
            return self.affine(shape, a, 1, b, alpha) if self.depends(a) else self.affine(shape, b, alpha, a, 1)
        first, second = self.node(a), self.node(b)
        if first.shape != second.shape:
            raise _Unsupported("addition of tensors of different shapes")
        return self.append("add", (first, second if alpha == 1 else self.affine(shape, b, alpha, 0, 1)), shape)

    def op_sub(self, shape, a, b, *, alpha=1):
        return self.op_add(shape, a, b, alpha=-alpha)

    def op_mul(self, shape, a, b):
        if self.depends(a) and self.depends(b):
            raise _Unsupported("products of two activations")
        return self.affine(shape, a, b, 0, 1) if self.depends(a) else self.affine(shape, b, a, 0, 1)

    def op_div(self, shape, a, b):
        if self.depends(b):
            raise _Unsupported("division by an activation")
        return self.affine(shape, a, 1 / b, 0, 1)

    def op_neg(self, shape, x):
        return self.affine(shape, x, -1, 0, 1)

    def affine(self, shape, x, scale, shift, factor) -> Node:
        """scale * x + factor * shift, `scale` and `shift` constants: one number or one a channel."""
        if x.shape != shape:
            raise _Unsupported("broadcasting of activations")
        weight, bias = _by_channel(scale, shape), _by_channel(shift, shape) * factor
        return self.append("affine", (self.node(x),), shape, weight=weight, bias=bias)

    def op_max_pool2d_with_indices(self, shape, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
        return self.append(
            "max_pool",
            (self.node(x),),
            shape,
            kernel=_pair(kernel, 1),
            stride=_pair(stride or kernel, 1),
            padding=_pair(padding, 0),
            dilation=_pair(dilation, 1),
        )

    def op_avg_pool2d(
        self, shape, x, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        kernel, stride, padding = _pair(kernel, 1), _pair(stride or kernel, 1), _pair(padding, 0)
        reach = [(n - 1) * s + k - 2 * p for n, s, k, p in zip(shape[-2:], stride, kernel, padding, strict=True)]
        if divisor_override or (any(padding) and not count_include_pad) or any(np.greater(reach, x.shape[-2:])):
            raise _Unsupported("average pooling that leaves padding or overhang out of the count")
        return self.append("avg_pool", (self.node(x),), shape, kernel=kernel, stride=stride, padding=padding)

    def op_adaptive_avg_pool2d(self, shape, x, size):
        return self.adaptive("avg_pool", shape, x)

    def op_adaptive_max_pool2d(self, shape, x, size):
        return self.adaptive("max_pool", shape, x)

    def op_mean(self, shape, x, dims, keepdim=False, dtype=None):
        if x.dim() < 3 or {d % x.dim() for d in dims} != set(range(2, x.dim())):
            raise _Unsupported("a mean over other dimensions than height and width")
        return self.adaptive("avg_pool", (*shape[:2], 1, 1), x)

    def adaptive(self, op, shape, x) -> Node:
        node = self.node(x)
        if any(np.mod(node.shape[1:], shape[-2:])):
            raise _Unsupported(f"adaptive pooling of {node.shape[1:]} to {tuple(shape[-2:])}")
        kernel = tuple(n // m for n, m in zip(node.shape[1:], shape[-2:], strict=True))
        return self.append(op, (node,), shape, kernel=kernel, stride=kernel)

    def op_view(self, shape, x, *args, **kwargs):
        """Same values, perhaps other dimensions."""
        node = self.node(x)
        if len(shape) in (2, 3, 4) and _planes(shape) == node.shape:
            return node
        if len(shape) == 2 and shape[0] == 1:
            return self.append("flatten", (node,), shape)
        raise _Unsupported(f"a change of shape from {tuple(x.shape)} to {tuple(shape)}")

    op_unsafe_view = op_squeeze = op_unsqueeze = op_detach = op_clone = op_alias = op_view

    def op_cat(self, shape, tensors, dim=0):
        if dim % len(shape) != 1:
            raise _Unsupported("concatenation of other than channels")
        return self.append("cat", tuple(self.node(tensor) for tensor in tensors), shape)


def _planes(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, *space = shape[1:]
    height, width = [1] * (2 - len(space)) + space
    return channels, height, width


def _pair(value: int | Sequence[int], line: int) -> Pair:
    """Height's and width's; `line` is the height's where there is no height, which is in 1d convolutions only."""
    if isinstance(value, int):
        return value, value
    return (line, value[0]) if len(value) == 1 else (value[0], value[1])


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy()


def _by_channel(value: float | Tensor, shape: Sequence[int]) -> np.ndarray:
    """A constant as one number a channel."""
    full = torch.as_tensor(value, dtype=torch.float64).expand(shape).flatten(2) if len(shape) > 2 else None
    if full is None:
        return torch.as_tensor(value, dtype=torch.float64).expand(shape)[0].numpy()
    if not bool((full == full[..., :1]).all()):
        raise _Unsupported("constants that differ within a channel")
    return full[0, :, 0].numpy()
