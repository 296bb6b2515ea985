"""A convolution, the norm after it, an addition and a ReLU as one node of autograd.

What a small network costs beside its arithmetic are nodes, calls and passes over memory. A planned layer therefore
gives a `Pending` in place of its output, and what follows in the model's own forward is noted until somebody reads the
result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .norm import Norm, compiled
from .once import once
from .taps import planes

if TYPE_CHECKING:
    from .gradient import DenseGradient
    from .layers import LayerPlan, NormPlan


class Pending:
    """Stands for a tensor [N, C, H, W]: relu(norm(convolution(x)) + residual), of which the parts may be absent.

    It is computed where anything but a norm, an addition or a ReLU reads it. Read in two ways, it is computed twice.
    """

    def __init__(self, x: Tensor, convolution: LayerPlan | None = None, dense: DenseGradient | None = None):
        """`dense` takes the gradient of the convolution's output."""
        self._x, self._convolution, self._dense = x, convolution, dense
        self._norm: NormPlan | None = None
        self._at: Tensor | None = None
        self._residual: Tensor | None = None
        self._each: int | None = None  # see `Norm`
        self._unmoved: list[Callable[[], float | None]] = []  # gives the share, until running statistics were moved
        self._grad = torch.is_grad_enabled()
        self._value: Tensor | None = None

    def normed(self, norm: NormPlan, channels: Tensor | None, share: Callable[[], float | None]) -> Pending:
        """After a norm; `channels` are those that the planes have of the norm's, None for all. `share` is asked once,
        where the running statistics are moved."""
        begun = self._norm is not None or self._value is not None
        after = Pending(self.value()) if begun else Pending(self._x, self._convolution, self._dense)
        after._norm, after._at, after._unmoved = norm, channels, [share]
        return after

    @classmethod
    def of_constants(
        cls, x: Tensor, each: int, norm: NormPlan, channels: Tensor, share: Callable[[], float | None]
    ) -> Pending:
        """Some channels after a norm that are constants of an image, [N or 1, C, 1, 1]: each number stands for `each`.
        The norm's other channels are computed before."""
        after = cls(x).normed(norm, channels, share)
        after._each = each
        return after

    def value(self) -> Tensor:
        if self._value is None:
            self._value = self._compute(relu=False)
        return self._value

    def relu(self, inplace: bool = False) -> Tensor:
        if self._norm is None or self._value is not None:
            return torch.relu_(self.value()) if inplace else torch.relu(self.value())
        result = self._compute(relu=True)
        if inplace:
            self._value = result
        return result

    def relu_(self) -> Tensor:
        return self.relu(inplace=True)

    def __add__(self, other: Any) -> Tensor | Pending:
        other = read(other)
        if not self._takes(other):
            return self.value() + other
        total = Pending(self._x, self._convolution, self._dense)
        total._norm, total._at, total._unmoved, total._residual = self._norm, self._at, self._unmoved, other
        return total

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Tensor | Pending:
        other = read(other)
        if not self._takes(other):
            return self.value().add_(other)
        self._residual = other
        return self

    def _takes(self, other: Any) -> bool:
        fresh = self._norm is not None and self._residual is None and self._value is None
        return (
            fresh
            and isinstance(other, Tensor)
            and other.shape == self.shape
            and compiled(other)
            and other.dtype == self.dtype
        )

    def _compute(self, relu: bool) -> Tensor:
        with torch.set_grad_enabled(self._grad):
            if self._norm is None:
                return self._x if self._convolution is None else self._convolution.product(self._x, self._dense)
            x, source, sink = self._x, None, None
            if self._convolution is not None:
                x, source, sink = self._convolution.operands(x)
            module = self._norm.module
            return _Layer.apply(x, source, module.weight, module.bias, self._residual, sink, self, relu)

    @property
    def shape(self) -> torch.Size:
        if self._value is not None or self._convolution is None:
            return (self._x if self._value is None else self._value).shape
        return self._convolution.shape_after(self._x)

    @property
    def channels(self) -> int:
        if self._value is not None or self._convolution is None:
            return self.shape[1]
        return self._convolution.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype if self._convolution is None else self._convolution.module.weight.dtype

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        if name == "relu" and args and isinstance(args[0], Pending):
            return args[0].relu(kwargs.get("inplace", False) or func.__name__ == "relu_")
        if name in ("add", "radd") and len(args) == 2 and not kwargs and func.__name__ != "add_":
            first, second = args if isinstance(args[0], Pending) else reversed(args)
            return first + second
        return func(*read(list(args)), **read(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    def __len__(self) -> int:
        return self.shape[0]


def _method(name: str):
    return lambda self, *args: getattr(self.value(), name)(*map(read, args))


for _name in (
    "sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow matmul rmatmul neg abs getitem setitem eq ne lt le "
    "gt ge iter bool float int"
).split():
    setattr(Pending, f"__{_name}__", _method(f"__{_name}__"))


def read(value: Any) -> Any:
    """The same with tensors in place of what is pending, in lists and dictionaries too."""
    if isinstance(value, Tensor):
        return value
    return value.value() if isinstance(value, Pending) else tree_map_only(Pending, Pending.value, value)


class _Layer(torch.autograd.Function):
    """What a `Pending` with a norm stands for.

    `source` is the convolution's weight, whose gradient goes to `sink`; or, without one, its active values.
    """

    @staticmethod
    def forward(ctx, x, source, weight, bias, residual, sink, of: Pending, relu: bool) -> Tensor:
        x, values, z = planes(x), None, None
        if of._convolution is not None:
            values = source if sink is None else sink.active.values(source)
            ctx.passes = of._convolution.taps.passes(*x.shape[1:3])
            z = ctx.passes.convolve(x, values)
        share = of._unmoved.pop()() if of._unmoved else None
        ctx.norm = Norm(of._norm.module, weight, bias, of._at, share, relu, of._each)
        y, found = ctx.norm.forward(x if z is None else z, residual)
        ctx.save_for_backward(x, values, z, y if relu else None, found)
        ctx.sink, ctx.dense = sink, of._dense
        return y

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        (x, values, z, y, found), needs = ctx.saved_tensors, ctx.needs_input_grad
        normed = x if z is None else z
        grads = ctx.norm.backward(normed, y, found, planes(grad), needs[2:5])
        grad_x, grad_weight, grad_bias, grad_residual = grads
        grad_source = None
        if z is not None:
            grad_z, grad_x = grad_x, None
            if ctx.dense is not None:
                ctx.dense.from_kept(grad_z.permute(3, 0, 1, 2))
            if needs[0]:
                grad_x = ctx.passes.input_gradient(grad_z, values, x)
            if needs[1]:
                grad_source = ctx.passes.weight_gradient(grad_z, x).to(values.dtype)
                if ctx.sink is not None:
                    grad_source = ctx.sink.receive(grad_source, ctx, 1)
        grad_x, grad_residual = (None if g is None else g.permute(3, 0, 1, 2) for g in (grad_x, grad_residual))
        return grad_x, grad_source, grad_weight, grad_bias, grad_residual, None, None, None
