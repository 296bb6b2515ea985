"""Convolutions, linear layers and batch norms that compute a part of their channels while an engine says so."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..ops.active import Active
from ..ops.swap import Swapped
from ..plugins.transform.sharing import scale_of
from .fused import Pending, read
from .norm import compiled, normalise, normalise_with
from .norm import supported as supported_norm
from .once import once
from .split import Channels, Split
from .taps import TapConvolution, supported

if TYPE_CHECKING:
    from .gradient import DenseGradient

#: Forward methods of the layers that a plan can stand in for.
PLAIN = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Last:
    """The plan of the last pass whose gradients may be wanted, for all threads."""

    plan: Any = None


class Slot(threading.local):
    """Holds a module's plan during a thread's forward pass. Copies and pickles of the module get an empty one."""

    def __init__(self, last: Last | None = None):
        self.plan: Any = None
        self.last = last or Last()

    def __deepcopy__(self, memo):
        return Slot()

    def __reduce__(self):
        return Slot, ()


class Planned(Swapped):
    """Mixed into the class of every layer and norm of a model with an engine."""

    east_slot: Slot

    def forward(self, input, *args, **kwargs):
        plan = self.east_slot.plan
        if plan is None and self.east_slot.last.plan is not None and in_backward():
            plan = self.east_slot.last.plan  # gradient checkpointing computes a part of the pass again
        if plan is None:
            return super().forward(input, *args, **kwargs)
        if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
            return plan(input)
        with torch._C.DisableTorchFunction():  # what a mode waits for is not called here, and each operation would pay
            return plan(input)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Sink:
    """Where the gradient of a weight's active values goes: the weight's `grad`, a dense tensor that is zero elsewhere.

    The tensor is kept between steps, and only its active entries are written, so that no step pays for a dense one.
    `before` is the sink of the same weight at its former positions.
    """

    def __init__(self, weight: Tensor, active: Active, before: Sink | None = None):
        self.weight, self.active = weight, active
        self.buffer: Tensor | None = None
        self.version: int | None = None
        #: The gradient of all weights, where a rule wants it.
        self.dense: Tensor | None = before.dense if before else None
        if before is not None and before.is_clean():
            self.buffer = before.buffer
            before.active.put(self.buffer, 0)
            self.version = self.buffer._version

    def is_clean(self) -> bool:
        """Whether the buffer was written to by nobody else since."""
        return self.buffer is not None and self.buffer._version == self.version

    def holds_gradient(self) -> bool:
        return self.weight.grad is not None and self.weight.grad is self.buffer

    def scale(self, factor: Tensor) -> None:
        """Multiply `grad`, which nobody else wrote to."""
        assert self.buffer is not None
        self.active.put(self.buffer, self.active.values(self.buffer) * factor)
        self.version = self.buffer._version

    def begin(self) -> None:
        """A pass begins: gradients of earlier ones count while they are in `grad`."""
        if self.dense is not None and (self.weight.grad is None or not bool(self.weight.grad.any())):
            self.dense = None

    def add_dense(self, rows: Tensor, columns: Tensor, gradient: Tensor) -> None:
        """Add to a block of the gradient of all weights."""
        if self.dense is None:
            self.dense = torch.zeros_like(self.weight)
        self.dense[rows[:, None], columns] += gradient

    def take(self, wanted: bool) -> None:
        """Make a dense gradient, which autograd accumulated in `grad`, one of active values; keep it where wanted."""
        grad = self.weight.grad
        assert grad is not None
        if wanted and self.dense is not None and grad is self.buffer:  # earlier passes' active values are in it
            self.active.put(self.dense, 0.0)
            self.dense += grad
        elif wanted:
            self.dense = grad.clone() if self.dense is None else self.dense.add_(grad)
        values = self.active.values(grad)
        if grad is self.buffer or not self.is_clean():
            self.buffer = torch.zeros_like(self.weight)
        assert self.buffer is not None
        self.active.put(self.buffer, values)
        self.weight.grad = self.buffer
        self.version = self.buffer._version

    def receive(self, gradient: Tensor, node: Any, number: int) -> Tensor | None:
        """Take the gradient of the active values from a node of autograd whose input `number` is the weight; return
        what the node is to return for it."""
        if not _accumulates(node.next_functions[number][0]):
            return self.active.spread(gradient)
        self.add(gradient)
        return None

    def add(self, gradient: Tensor) -> None:
        if self.weight.grad is not None:
            self.weight.grad[self.active.coordinates] += gradient
        else:
            if not self.is_clean():
                self.buffer = torch.zeros_like(self.weight)
            self.active.put(self.buffer, gradient)
            self.weight.grad = self.buffer
        self.version = self.weight.grad._version


class _ActiveValues(torch.autograd.Function):
    """The active values of a weight; their gradient goes to the sink and not through autograd, which would spread it
    over a dense tensor at every step."""

    @staticmethod
    def forward(ctx, weight: Tensor, sink: Sink) -> Tensor:
        ctx.sink = sink
        return sink.active.values(weight)

    @staticmethod
    @once
    def backward(ctx, gradient: Tensor):
        return ctx.sink.receive(gradient, ctx, 0), None


def _accumulates(node: Any) -> bool:
    """Whether the gradient goes to `grad`, as in `backward()`, and not to the caller of `torch.autograd.grad`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # "a leaf node was passed ... but we are currently running autograd.grad()"
        return False


class LayerPlan:
    """A convolution or linear layer over compact channels.

    Args:
        inputs, outputs: the channels that the input has and that the output gets; int64, ascending.
        split: whether a convolution's other channels go on as a constant of each image, see `split`.
        fuses: whether it may be one node of autograd with what follows it, see `fused`.
    """

    def __init__(
        self, module: nn.Module, sink: Sink, inputs: Tensor, outputs: Tensor, split: bool = False, fuses: bool = False
    ):
        self.module, self.sink, self.fuses = module, sink, fuses
        target, source, *place = sink.active.coordinates
        groups = getattr(module, "groups", 1)
        source = source + target // (module.weight.shape[0] // groups) * module.weight.shape[1]
        sizes = module.weight.shape[0], module.weight.shape[1] * groups
        self.shape = (len(outputs), len(inputs), *module.weight.shape[2:])
        device = sink.active.flat.device
        target, source = (
            _numbering(kept, size).to(device)[channels]
            for channels, kept, size in zip((target, source), (outputs, inputs), sizes, strict=True)
        )
        self.axis, self.inputs = (-1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()), inputs.to(device)
        self.coordinates = (target, source, *place)
        self.outputs = None if len(outputs) == sizes[0] else outputs.to(device)
        self.split = Channels.of(outputs, sizes[0], device) if split and isinstance(module, nn.Conv2d) else None
        self._taps: TapConvolution | None = None

    def __call__(self, x: Any) -> Any:
        x = read(x.kept if isinstance(x, Split) else x)
        y = self.begun(x)
        if self.split is None:
            return y
        rest = x.new_zeros(1, len(self.split.rest), 1, 1, dtype=y.dtype)
        if self.module.bias is not None:
            rest = rest + self.module.bias[self.split.rest].view(-1, 1, 1)
        return Split(y, rest, self.split)

    def begun(self, x: Tensor, dense: DenseGradient | None = None) -> Tensor | Pending:
        """The output for planned channels, or what stands for it until what follows is known; `dense` takes its
        gradient."""
        return Pending(x, self, dense) if self._is_first_of_node(x) else self.product(x, dense)

    def _is_first_of_node(self, x: Tensor) -> bool:
        """Whether a norm after it may be computed with it."""
        module = self.module
        fuses = self.fuses and module.training and module.bias is None and not torch.compiler.is_compiling()
        return fuses and supported(module, x)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Sink | None]:
        """The input with its planned channels, and the weight with where its gradient goes; or, where the active
        values are scaled, these."""
        weight, x = self.module.weight, self._planned(x)
        scaled = scale_of(self.module) is not None
        return x.to(weight.dtype), *((self._values(), None) if scaled else (weight, self.sink))

    def _planned(self, x: Tensor) -> Tensor:
        """The planned channels of an input that has them, or all, put together by an operation that needs those."""
        return x if x.shape[self.axis] == self.shape[1] else x.index_select(self.axis, self.inputs)

    def _values(self) -> Tensor:
        """The active values, scaled where the weight is shared."""
        values, scale = _ActiveValues.apply(self.module.weight, self.sink), scale_of(self.module)
        return values if scale is None else values * scale

    def shape_after(self, x: Tensor) -> torch.Size:
        """Of the output, for an input [N, C, H, W]."""
        return torch.Size((len(x), *self.taps.passes(*x.shape[2:]).shape))

    def product(self, x: Tensor, dense: DenseGradient | None = None) -> Tensor:
        y = self._product(x)
        if dense is not None and y.requires_grad:  # not in the first, gradient-free pass of a checkpoint
            y.register_hook(dense.from_kept)
        return y

    def _product(self, x: Tensor) -> Tensor:
        module, x, values = self.module, self._planned(x), self._values()
        bias = module.bias if module.bias is None or self.outputs is None else module.bias[self.outputs]
        if supported(module, x):
            y = self.taps(x, values)
            return y if bias is None else y + bias.view(-1, 1, 1)
        weight = values.new_zeros(self.shape).index_put_(self.coordinates, values)
        return F.linear(x, weight, bias) if isinstance(module, nn.Linear) else _convolve(module, x, weight, bias)

    def alone(self) -> LayerPlan:
        """The same plan, whose results are tensors: for modules with hooks on them."""
        plan = copy.copy(self)
        plan.fuses = False
        return plan

    def apart(self, leaves: Mapping[int, Tensor], sinks: dict[int, Sink]) -> LayerPlan:
        """The same plan for a pass on other weights: `leaves` by the ids of the model's; their sinks are noted."""
        plan, key = copy.copy(self), id(self.sink.weight)
        plan.sink = sinks.setdefault(key, Sink(leaves[key], self.sink.active))
        return plan

    @property
    def taps(self) -> TapConvolution:
        if self._taps is None:
            self._taps = TapConvolution(self.module, *self.coordinates, *self.shape[:2])
        return self._taps


def _numbering(kept: Tensor, size: int) -> Tensor:
    """The compact number of each of `size` channels; -1 for one that is left out."""
    numbers = torch.full((size,), -1)
    numbers[kept] = torch.arange(len(kept))
    return numbers


def _convolve(module: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the module convolves, but with another weight, and one group."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    return _CONVOLVE[weight.dim() - 2](x, weight, bias, module.stride, padding, module.dilation)


class NormPlan:
    """A batch norm over compact channels, with the running statistics of all.

    A channel that is left out is zero before the norm, so that its mean and variance are zero.
    """

    def __init__(self, module: _BatchNorm, channels: Tensor, fuses: bool = False):
        self.module, self.fuses = module, fuses
        self.channels = None if len(channels) == module.num_features else channels.to(_device(module))

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Split):
            found = x.channels if isinstance(x, Pending) else x.shape[1]
            y = self._norm(x, None if found == self.module.num_features else self.channels)
            return y if self.fuses and not torch.compiler.is_compiling() else read(y)
        share = self.share()
        y = read(self._norm(x.unread, self.channels))
        rest = self._constants(x.rest, x.channels.rest, y[:, 0].numel(), share) if len(x.channels.rest) else x.rest
        return Split(y, rest, x.channels)

    @property
    def _uses_running(self) -> bool:
        return not self.module.training and self.module.running_mean is not None

    def _norm(self, x: Tensor | Pending, channels: Tensor | None) -> Tensor | Pending:
        """The norm of kept channels."""
        module, kept = self.module, slice(None) if channels is None else channels
        if not self._uses_running and (isinstance(x, Pending) or compiled(x)):
            return (x if isinstance(x, Pending) else Pending(x)).normed(self, channels, self.share)
        x = read(x)
        weight, bias = (None if p is None else p[kept] for p in (module.weight, module.bias))
        if self._uses_running:
            return normalise_with(x, module.running_mean[kept], module.running_var[kept], weight, bias, module.eps)
        y, mean, variance = normalise(x, weight, bias, module.eps)
        if (share := self.share()) is not None:
            self.module.num_batches_tracked.add_(1)
            torch._foreach_mul_([module.running_mean, module.running_var], 1 - share)
            self._move(share, kept, mean, variance)
        return y

    def _constants(self, x: Tensor, channels: Tensor, count: int, share: float | None) -> Tensor:
        """The norm of channels that are constants of an image, [N or 1, channels, 1, 1], of `count` numbers in all."""
        module = self.module
        if not self._uses_running and supported_norm(x):
            return Pending.of_constants(x, count // len(x), self, channels, lambda: share).value()
        weight, bias = (None if p is None else p[channels].view(-1, 1, 1) for p in (module.weight, module.bias))
        if self._uses_running:
            mean, variance = (t[channels].view(-1, 1, 1) for t in (module.running_mean, module.running_var))
        else:
            mean = x.mean(0)
            variance = (x - mean).square().mean(0)
            if share is not None:
                unbiased = count / max(1, count - 1)
                self._move(share, channels, mean.flatten(), variance.flatten() * unbiased)
        y = (x - mean) * (variance + module.eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def apart(self, leaves: Mapping[int, Tensor], sinks: dict[int, Sink]) -> NormPlan:
        return self

    def alone(self) -> NormPlan:
        """As `LayerPlan.alone`."""
        plan = copy.copy(self)
        plan.fuses = False
        return plan

    @torch.no_grad()
    def _move(self, share: float, channels: Tensor | slice, mean: Tensor, variance: Tensor) -> None:
        self.module.running_mean[channels] += share * mean
        self.module.running_var[channels] += share * variance

    def share(self) -> float | None:
        """Share of this batch in the running statistics, None where there are none to move; without a momentum they are
        the plain average over batches."""
        if not self.module.training or self.module.running_mean is None:
            return None
        momentum = self.module.momentum
        return 1 / (float(self.module.num_batches_tracked) + 1) if momentum is None else momentum


def _device(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
