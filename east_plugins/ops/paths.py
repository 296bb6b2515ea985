"""Which weights lie on a path from the network's input to its output, found with its linearised twin.

The twin is the model's own forward pass with norms, activations, dropout and softmax as identities, max-pooling as
average pooling, biases left out and weights replaced by their masks. On an input of ones, the gradient of its output
with respect to a mask entry is positive exactly where the entry's input is reached from the network's input and its
output is read by the network's output. Values and gradients are cut to 0 and 1 at every layer, so that no depth and
no number of paths over- or underflows them. Tied weights stay tied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .marks import Marked
from .maskable import theoretical_size
from .modes import backward as backpropagate
from .modes import training_mode
from .substitute import substituted

#: Operations by name, without leading and trailing underscores.
IDENTITIES = {
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "rrelu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "hardsigmoid",
    "logsigmoid",
    "tanh",
    "hardtanh",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "softplus",
    "softsign",
    "hardswish",
    "threshold",
    "clamp",
    "clip",
    "softmax",
    "log_softmax",
    "softmin",
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "instance_norm",
    "local_response_norm",
    "normalize",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
}
LAYERS = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}


def path_positions(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """For every mask the positions, active or not, at which an active weight is or would be on a path.

    Boolean tensors of the masks' shapes, on their devices. Parameters without a mask count as connections, and so
    does the fixed matrix of a DCT layer. `input_shape` leaves out the batch. The model is left as it was.
    """
    if not masks:
        return {}
    device = next(model.parameters()).device
    leaves = {name: mask.to(device, torch.float32).requires_grad_() for name, mask in masks.items()}
    x = torch.ones(1, *input_shape, device=device, requires_grad=True)
    with torch.enable_grad():
        run_with(model, leaves, x, Twin(), backward=True)
    return {name: (flow > 0).to(masks[name].device) for name, flow in zip(leaves, gradients(leaves), strict=True)}


def on_path(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """The active weights that lie on a path, as boolean tensors; otherwise as `path_positions`."""
    positions = path_positions(model, masks, input_shape)
    return {name: positions[name] & mask for name, mask in masks.items()}


def effective_density(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> float:
    """Active weights on a path / maskable weights of the unshared network, in [0, 1]: the density that counts
    (one minus the effective sparsity of Vysogorets and Kempe 2023)."""
    return sum(int(mask.sum()) for mask in on_path(model, masks, input_shape).values()) / theoretical_size(model)


def run_with(
    model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, mode: TorchFunctionMode, *, backward: bool = False
) -> list[Tensor]:
    """The model's outputs for `x` under `mode`, in evaluation, with `weights` by name in place of its own.

    All other parameters are ones (scales pass everything on), biases zeros; activations that are being phased out
    are ReLUs. With `backward`, the gradient of the outputs' sum is added to `grad` of the weights, which are leaves:
    networks that compute parts of the pass again for it, as checkpoints do, have to do it here. The model and the
    global random state are left as they were.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replaced = {id(parameters[name]) for name in weights}
    tensors = {
        id(parameter): torch.full((), float(not name.endswith("bias")), device=x.device).expand(parameter.shape)
        for name, parameter in model.named_parameters()
        if id(parameter) not in replaced and parameter.is_floating_point()
    }
    tensors |= {id(parameters[name]): weight for name, weight in weights.items()}
    tensors |= {id(buffer): buffer.clone() for buffer in model.buffers()}
    with plain_evaluation(model), substituted(model, tensors), torch.random.fork_rng([]), mode:
        outputs = [output for output in tree_leaves(model(x)) if isinstance(output, Tensor)]
        if backward:
            total = sum((output.sum() for output in outputs), x.new_zeros(()))
            backpropagate(total, torch.ones_like(total))
    return outputs


def gradients(leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """`grad` of leaves, zeros where there is none."""
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]


@contextlib.contextmanager
def plain_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, phased activations off (their ReLUs run then), DCT layers as one product."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(training_mode(model, False))
        for module in model.modules():
            if isinstance(module, Marked):
                stack.enter_context(module.plain())
        yield


class _Cut(torch.autograd.Function):
    """1 where the value is over `floor` in size, else 0; the gradient likewise with `gradient_floor`.

    Sums of products of zeros and ones are whole numbers: with a floor of 1/2 they survive the rounding of any
    convolution algorithm. Where other operations come in between, the floor is 0.
    """

    @staticmethod
    def forward(ctx, x, floor, gradient_floor):
        ctx.floor = gradient_floor
        return x.abs().gt_(floor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.abs().gt_(ctx.floor), None, None


class Twin(TorchFunctionMode):
    """The linearised twin; `layer` computes a convolution or linear layer of it."""

    @staticmethod
    def layer(func, input, weight, bias=None, *args, **kwargs):
        output = func(_Cut.apply(input, 0, 0.5), _Cut.apply(weight, 0, 0.5), None, *args, **kwargs)
        return _Cut.apply(output, 0.5, 0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in LAYERS:
            return self.layer(func, *args, **kwargs)
        if name in IDENTITIES:
            return identity(func, *args, **kwargs)
        if name in _POOLS:
            return _POOLS[name](*args, **kwargs)
        return func(*args, **kwargs)


def identity(func, input, *args, inplace=False, **kwargs):
    """`input` itself where `func` works in place, else a copy."""
    return input if inplace or func.__name__.endswith("_") else input.clone()


def _average(pool):
    def averaged(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        return pool(input, kernel_size, stride or kernel_size, padding, ceil_mode)

    return averaged


def _adaptive_average(pool):
    return lambda input, output_size, return_indices=False: pool(input, output_size)


_POOLS = {
    "max_pool1d": _average(F.avg_pool1d),
    "max_pool2d": _average(F.avg_pool2d),
    "max_pool3d": _average(F.avg_pool3d),
    "adaptive_max_pool1d": _adaptive_average(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adaptive_average(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adaptive_average(F.adaptive_avg_pool3d),
    "amax": torch.mean,
}
