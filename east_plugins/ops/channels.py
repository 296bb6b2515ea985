"""Which channels the layers of a network read and write, found by one forward pass that carries channel numbers.

The pass sends tensors whose values are the numbers of the channels they hold. Layers write new numbers; additions
and products of two tensors join theirs, as in a residual stream; whatever only moves values about (concatenation,
flattening, slicing, padding) works as it is. Number 0 stands for padding and for the results of operations that mix
channels in unknown ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .paths import IDENTITIES, LAYERS, identity, run_with

_JOINS = {
    "add",
    "iadd",
    "radd",
    "sub",
    "isub",
    "rsub",
    "subtract",
    "mul",
    "imul",
    "rmul",
    "multiply",
    "div",
    "truediv",
    "itruediv",
    "rtruediv",
    "divide",
    "maximum",
    "minimum",
}


@dataclass(frozen=True)
class Wires:
    """Channel numbers of one layer: `source` is read and `target` written by the weights at [i, j, ...]; both
    broadcast to the weight's first two dimensions. `sources` and `targets` are the distinct numbers without 0.

    Channels that an addition or a depthwise convolution couples have one number.
    """

    source: Tensor
    target: Tensor
    sources: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Wiring:
    """Wires of every layer by its weight's name, the network's own inputs and outputs, and 1 + the largest number.

    Layers that the forward pass does not call, or not with their weight alone, read and write number 0. `norms` are
    the numbers of the channels that each of the given norms gets, number 0 where it is not called. `added` names the
    layer before each norm that gets a layer's output as it is and hands it on to an addition or a product.
    """

    layers: dict[str, Wires]
    norms: dict[str, Tensor]
    inputs: Tensor
    outputs: Tensor
    size: int
    added: dict[str, str]


@torch.no_grad()
def trace(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    input_shape: Sequence[int],
    norms: Mapping[str, _BatchNorm] = {},
) -> Wiring:
    """Wiring of the layers whose weights have the given names and shapes, and of the given batch norms; the model is
    left as it was."""
    names = list(shapes)
    device = next(model.parameters()).device
    weights = {  # the value tells which one it is; other parameters are ones
        name: torch.tensor(i + 2.0, dtype=torch.float32, device=device).expand(tuple(shapes[name]))
        for i, name in enumerate(names)
    }
    mode = _Trace(names)
    channels = mode.new(input_shape[0]).to(device)
    x = channels.view(1, -1, *[1] * (len(input_shape) - 1)).expand(1, *input_shape).clone()
    with mode.watching(norms):
        outputs = run_with(model, weights, x.as_subclass(_Numbers), mode)
    label = mode.labels()
    zero = torch.zeros(1, 1, dtype=torch.long)

    def wires(name: str) -> Wires:
        source, target = (label[side] for side in mode.layers.get(name, (zero, zero)))
        return Wires(source, target, _distinct(source), _distinct(target))

    written = torch.cat([_numbers(output).flatten() for output in outputs if isinstance(output, _Numbers)])
    layers = {name: wires(name) for name in names}
    seen = {
        name: label[mode.norms.get(name, torch.zeros(norm.num_features, dtype=torch.long))]
        for name, norm in norms.items()
    }
    return Wiring(
        layers, seen, _distinct(label[_numbers(channels)]), _distinct(label[written]), len(label), mode.added()
    )


class _Numbers(Tensor):
    """Marks the tensors whose values are channel numbers."""


class _Trace(TorchFunctionMode):
    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = names
        self.count = 1
        self.layers: dict[str, tuple[Tensor, Tensor]] = {}
        self.norms: dict[str, Tensor] = {}
        self.joined: list[Tensor] = []
        self.operands: set[int] = set()
        self.direct: dict[str, set[int]] = {}

    @contextlib.contextmanager
    def watching(self, norms: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note the numbers that each of the norms gets; one that is called twice has one set of channels."""

        def note(name):
            def hook(module, args):
                numbers = _numbers(_along(args[0], 1))
                if name not in self.norms and self.operands.isdisjoint(numbers.tolist()):
                    self.direct[name] = set(numbers.tolist())
                self._couple(numbers, self.norms.setdefault(name, numbers))

            return hook

        with contextlib.ExitStack() as stack:
            for name, norm in norms.items():
                handle = norm.register_forward_pre_hook(note(name))
                stack.callback(handle.remove)
            yield

    def new(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count, dtype=torch.float32)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Numbers)]
        name = getattr(func, "__name__", "").strip("_")
        if not operands:
            return func(*args, **kwargs)
        if name in IDENTITIES:
            return identity(func, *args, **kwargs)
        if name in LAYERS:
            return self._layer(func, name, *args, **kwargs)
        if name in _JOINS:
            kept = self._join(operands, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
            return args[0].copy_(kept) if _in_place(func) else kept

        def checked(result: Tensor) -> Tensor:
            return result if self._only_moved(operands, result) else _same_axis(operands, result.shape)

        return tree_map_only(Tensor, checked, func(*args, **kwargs))

    def _layer(self, func, name, input, weight, bias=None, *args, **kwargs):
        meta = (torch.empty(tensor.shape, device="meta") for tensor in (input, weight))
        shape = func(*meta, None, *args, **kwargs).shape
        axis = len(shape) - 1 if name == "linear" else len(shape) - weight.dim() + 1
        out = torch.zeros(shape, dtype=torch.float32, device=input.device)
        value = weight.flatten()[0].item()
        if value >= 2 and bool((weight == value).all()):
            read = _numbers(_along(input, axis))
            written = self._connect(self.names[int(value) - 2], read, weight.shape, shape[axis], "transpose" in name)
            out += written.view([-1 if i == axis else 1 for i in range(len(shape))]).to(out)
        return out.as_subclass(_Numbers)

    def _connect(self, layer: str, read: Tensor, shape: Sequence[int], outputs: int, transposed: bool) -> Tensor:
        """Note a use of `layer`, which has one set of channels however often it is used; returns the written."""
        inputs, groups = len(read), len(read) // shape[1] if not transposed else outputs // shape[1]
        if layer not in self.layers:
            written = self.new(outputs).long()
            if transposed:
                source, target = read[:, None], _by_group(written, groups, inputs)
            else:
                source, target = _by_group(read, groups, outputs), written[:, None]
            self.layers[layer] = source, target
            if groups > 1:  # channels of one group in the same place belong together
                self._couple(written, read[torch.arange(outputs) * inputs // outputs])
                self._couple(read, written[torch.arange(inputs) * outputs // inputs])
            return written
        source, target = self.layers[layer]
        self.operands.difference_update(target.flatten().tolist())  # written anew
        if transposed:
            self._couple(read, source.flatten())
            return target[:: inputs // groups].flatten()
        self._couple(read, source[:: outputs // groups].flatten())
        return target.flatten()

    def _join(self, operands: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """Couple channel with channel; one that meets several, such as a gate common to all channels, stays alone."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        for operand in operands:
            self.operands.update(_numbers(operand).unique().tolist())
        first, *others = (operand.expand(shape) for operand in operands)
        for other in others:
            a, b = self._pairs(_numbers(first), _numbers(other))
            alone = (a.bincount()[a] == 1) & (b.bincount()[b] == 1)
            self._couple(a[alone], b[alone])
            first = torch.where(first == 0, other, first)
        return first.clone()

    def _couple(self, a: Tensor, b: Tensor) -> None:
        self.joined.append(self._pairs(a, b))

    def added(self) -> dict[str, str]:
        """`Wiring.added`."""
        written = {number: name for name, (_, target) in self.layers.items() for number in target.flatten().tolist()}
        found = {}
        for norm, numbers in self.direct.items():
            names = {written.get(number) for number in numbers & self.operands}
            if len(names) == 1 and (name := names.pop()) is not None:
                found[norm] = name
        return found

    @staticmethod
    def _pairs(a: Tensor, b: Tensor) -> Tensor:
        """The distinct pairs of different channels; shape [2, pairs]."""
        pairs = (a * 2**31 + b)[(a != b) & (a > 0) & (b > 0)].unique()
        return torch.stack([pairs // 2**31, pairs % 2**31])

    def _only_moved(self, operands: Sequence[Tensor], result: Tensor) -> bool:
        """Whether the result holds its operands' numbers and nothing else."""
        if result.is_complex():
            return False
        known = torch.zeros(self.count, dtype=torch.bool)
        known[0] = True
        for operand in operands:
            known[_numbers(operand)] = True
        values = result.as_subclass(Tensor).float()
        numbers = _numbers(values.clamp(0, self.count - 1))
        return bool((numbers.to(values.device) == values).all() and known[numbers].all())

    def labels(self) -> Tensor:
        """For every number the one that stands for all it is coupled with, without gaps; 0 stays 0."""
        label = torch.arange(self.count)
        a, b = torch.cat(self.joined, 1) if self.joined else torch.empty(2, 0, dtype=torch.long)
        while True:
            least = torch.minimum(label[a], label[b])
            new = label.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
            new = new[new]
            if torch.equal(new, label):
                return label.unique(return_inverse=True)[1]
            label = new


def _in_place(func) -> bool:
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _same_axis(operands: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Numbers of an operation that keeps a channel axis (pooling, means, interpolation): those of the operand whose
    numbers depend on one axis only, of the same length; else 0."""
    for operand in operands:
        for axis in (1, operand.dim() - 1):
            if axis < min(operand.dim(), len(shape)) and operand.shape[axis] == shape[axis]:
                line = _along(operand, axis).as_subclass(Tensor)
                view = line.view([-1 if i == axis else 1 for i in range(operand.dim())])
                if bool(((operand == view) | (operand == 0)).all()) and bool((line > 0).any()):
                    line = line.view([-1 if i == axis else 1 for i in range(len(shape))])
                    return line.expand(shape).clone().as_subclass(_Numbers)
    return torch.zeros(shape, dtype=torch.float32, device=operands[0].device).as_subclass(_Numbers)


def _along(numbers: Tensor, axis: int) -> Tensor:
    """The largest number at every place along an axis: padding beside channels counts as the channel."""
    return numbers.as_subclass(Tensor).movedim(axis, 0).flatten(1).amax(1)


def _by_group(channels: Tensor, groups: int, partners: int) -> Tensor:
    """For each of the `partners` on the other side the channels of its group; shape [partners or 1, per group]."""
    per_group = channels.view(groups, -1)
    return per_group if groups == 1 else per_group.repeat_interleave(partners // groups, 0)


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor).long().cpu()


def _distinct(numbers: Tensor) -> Tensor:
    numbers = numbers.unique()
    return numbers[numbers > 0]
