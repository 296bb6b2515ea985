"""Notes what a network computes while it runs, as a graph of few kinds of operations.

Of every tensor that depends on the input it is known where each of its numbers lies in the result of an operation. What
only moves numbers (a view, a permutation, a slice) is done on these places, and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from .node import Node, Shape

SUPPORTED = (
    "1d and 2d convolution, linear, batch, layer and group norm, ReLU, ReLU6, sigmoid, SiLU, GELU, hardswish, tanh, "
    "softmax, max and average pooling, addition, products, attention, slices, permutations, nearest upsampling, "
    "flatten and concatenation"
)


class Unsupported(Exception):
    """What an operation does that cannot be exported."""


class _Value(NamedTuple):
    """A tensor that depends on the input; `places`, of its shape, say where its numbers lie in a node's result."""

    tensor: Tensor  # kept, so that no id is used twice
    node: Node
    places: Tensor


#: Operations that only say where numbers lie, and are done on their places alike.
MOVES = {
    "view", "unsafe_view", "reshape", "permute", "transpose", "t", "slice", "select", "expand", "squeeze", "unsqueeze",
    "split", "split_with_sizes", "chunk", "unbind", "flip", "roll", "index_select", "detach", "clone", "alias",
    "contiguous", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "lift_fresh", "repeat",
    "native_channel_shuffle",
}  # fmt: skip


class Tracer(TorchDispatchMode):
    """Notes a node for every operation on a tensor that depends on the input.

    A handler's name is `op_` and the operation's; it takes the shape of the result and the operation's arguments, and
    gives a node with the places of the result's numbers in it.
    `model` gets hooks, so it is a copy.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.running = [type(model).__name__]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name or self.running[0]))
            module.register_forward_hook(lambda *_: self.running.pop() and None, always_call=True)
        self.nodes: list[Node] = []
        self.values: dict[int, _Value | tuple[Tensor]] = {}
        node = self.append("input", (), planes(x.shape))
        self.values[id(x)] = _Value(x, node, places_of(x.shape))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if self.depends(leaf)]
        if not operands:
            return result
        name = func.overloadpacket.__name__.strip("_")
        if all(not isinstance(self.values[id(operand)], _Value) for operand in operands):
            for other in tree_leaves(result):
                self.values[id(other)] = (other,)
            return result
        try:
            if name in MOVES:
                if len(operands) > 1:
                    raise Unsupported(f"{name} by what is computed")
                self.move(func, result, args, kwargs)
            else:
                first, *others = result if isinstance(result, tuple) else (result,)
                self.values[id(first)] = self.handle(name, first, args, kwargs)
                for other in others:  # a pool's indices, a norm's statistics: of no use to the output
                    self.values[id(other)] = (other,)
        except Unsupported as error:
            raise UsageError(f"{self.running[-1]}: export does not support {error}; it does {SUPPORTED}") from None
        return result

    def handle(self, name, result, args, kwargs) -> _Value:
        handler = getattr(self, "op_" + name, None)
        if handler is None or not isinstance(result, Tensor):
            raise Unsupported(name)
        node, index = handler(result.shape, *args, **kwargs)
        return _Value(result, node, index.reshape(result.shape))

    def move(self, func, result, args, kwargs) -> None:
        value = self.value(args[0])
        moved = func(value.places, *args[1:], **kwargs)
        for tensor, index in zip(tree_leaves(result), tree_leaves(moved), strict=True):
            self.values[id(tensor)] = _Value(tensor, value.node, index)

    def depends(self, value) -> bool:
        return id(value) in self.values

    def value(self, tensor: Tensor) -> _Value:
        value = self.values.get(id(tensor))
        if not isinstance(value, _Value):
            raise Unsupported("what is computed here")
        return value

    def append(self, op: str, inputs: tuple[Node, ...], shape: Shape, **attributes) -> Node:
        numbers = [attributes.get("weight"), attributes.get("bias")]
        if not all(np.isfinite(array).all() for array in numbers if array is not None):
            raise Unsupported("weights that are infinite or no number")
        self.nodes.append(Node(op, self.running[-1], inputs, shape, **attributes))
        return self.nodes[-1]

    # ------------------------------------------------------------------ places

    def pick(self, node: Node, places: Tensor) -> Node:
        """The numbers of a node at `places` of shape (channels, height, width); the node itself where these are all."""
        if tuple(places.shape) == node.shape and bool((places == places_of(places.shape)).all()):
            return node
        return self.append("pick", (node,), three(places.shape), index=places.numpy())

    def laid_out(self, x: Tensor, axes: Sequence[int]) -> tuple[Node, Tensor]:
        """A node whose channels run over these axes of a tensor and its positions over the others; with the places of
        the tensor's numbers in it."""
        value = self.value(x)
        axes = [axis % x.dim() for axis in axes]
        others = [axis for axis in range(x.dim()) if axis not in axes]
        order = [*axes, *others]
        turned = value.places.permute(order)
        channels, *space = math.prod(x.shape[a] for a in axes), *(x.shape[a] for a in others if x.shape[a] > 1)
        count = math.prod(space)
        if value.node.shape[1] * value.node.shape[2] == count:
            shape = three((channels, *value.node.shape[1:]))
        elif len(space) > 2:
            shape = three((channels, 1, count))
        else:
            shape = three((channels, *[1] * (2 - len(space)), *space))
        node = self.pick(value.node, turned.reshape(shape))
        back = places_of(turned.shape).permute([order.index(axis) for axis in range(x.dim())])
        return node, back

    def whole(self, x: Tensor) -> tuple[Node, Tensor]:
        """A node all of whose numbers are those of a tensor, once each."""
        value = self.value(x)
        size = math.prod(value.node.shape)
        if x.numel() == size and bool((value.places.flatten().sort().values == torch.arange(size)).all()):
            return value.node, value.places
        return self.laid_out(x, self.channel_axes(x))

    def channel_axes(self, x: Tensor) -> list[int]:
        """The axes along which a tensor's numbers come from other channels."""
        value = self.value(x)
        _, height, width = value.node.shape
        channel = value.places // (height * width)
        return [axis for axis in range(x.dim()) if x.shape[axis] > 1 and bool(channel.diff(dim=axis).any())]

    def constant(self, tensor: float | Tensor, shape: Shape, index: Tensor) -> Node:
        """A constant as a node of `shape`; `index` are the places of its numbers, after broadcasting."""
        values = torch.empty(math.prod(shape), dtype=torch.float64)
        values[index.flatten()] = torch.as_tensor(tensor, dtype=torch.float64).expand(index.shape).flatten()
        return self.append("constant", (), shape, weight=values.view(shape).numpy())

    def like(self, x: Tensor, node: Node, index: Tensor) -> Node:
        """A tensor, broadcast, with its numbers where those of another one lie: at `index` of `node`."""
        value = self.value(x)
        places = torch.empty(math.prod(node.shape), dtype=torch.int64)
        places[index.flatten()] = value.places.expand(index.shape).flatten()
        return self.pick(value.node, places.view(node.shape))


def three(shape: Sequence[int]) -> Shape:
    channels, height, width = shape
    return channels, height, width


def places_of(shape: Sequence[int]) -> Tensor:
    """0, 1, 2, ... in a tensor of this shape."""
    return torch.arange(math.prod(shape)).view(tuple(shape))


def planes(shape: Sequence[int]) -> Shape:
    if not 2 <= len(shape) <= 4 or shape[0] != 1:
        raise Unsupported(f"tensors of shape {tuple(shape)}")
    channels, *space = shape[1:]
    height, width = [1] * (2 - len(space)) + space
    return channels, height, width
