"""Dynamic ReLU (Chen et al., "Dynamic ReLU", ECCV 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from ...errors import UsageError
from ...ops.fusion import fused
from ..registry import activation

_K = 2  # linear functions of which the maximum is taken
_TEMPERATURE = 10


def max_of_lines(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """`max(a1 x + b1, a2 x + b2)`, element by element, for coefficients that broadcast against x. Tensor-likes may
    override it, as any function of torch."""
    if has_torch_function_unary(x):
        return handle_torch_function(max_of_lines, (x,), x, a1, b1, a2, b2)
    return _MaxOfLines.apply(x, a1, b1, a2, b2)


class _MaxOfLines(torch.autograd.Function):
    """Keeps x alone for the backward pass, which takes a third of the operations that autograd takes."""

    @staticmethod
    def forward(ctx, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, a1, b1, a2, b2)
        return fused(_larger, x, a1, b1, a2, b2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return fused(_larger_backward, grad, *ctx.saved_tensors)


def _larger(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    return torch.maximum(torch.addcmul(b1, a1, x), torch.addcmul(b2, a2, x))


def _larger_backward(grad: Tensor, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    a, b = a1 - a2, b1 - b2
    half = torch.full((), 0.5, dtype=x.dtype, device=x.device)  # where both are equal, as torch.maximum has it
    first = torch.heaviside(torch.addcmul(b, a, x).detach(), half)
    one, both = grad * first, grad * x
    db1, da1 = (t.sum_to_size(a.shape) for t in (one, both * first))
    db2, da2 = (t.sum_to_size(a.shape) for t in (grad, both))
    return grad * torch.addcmul(a2, a, first), da1, db1, da2 - da1, db2 - db1


def position_mean(x: Tensor) -> Tensor:
    """Means of [N, C, ...] over positions; [N, C]. Tensor-likes may override it."""
    if has_torch_function_unary(x):
        return handle_torch_function(position_mean, (x,), x)
    return x.sum(tuple(range(2, x.dim()))) / x[0, 0].numel()  # its gradient is a view, that of a mean as large as x


def dynamic_relu(
    x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor, beta: Tensor | None = None
) -> Tensor:
    """What `DyReLUB` computes, from weight and bias of its two layers. Tensor-likes may override it."""
    if has_torch_function_unary(x):
        return handle_torch_function(dynamic_relu, (x,), x, squeeze, squeeze_bias, excite, excite_bias, beta)
    return lines_of_input(x, squeeze, squeeze_bias, excite, excite_bias, beta)


def lines_of_input(
    x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor, beta: Tensor | None
) -> Tensor:
    """`dynamic_relu` by `position_mean` and `max_of_lines`, for tensor-likes that have these."""
    positions = tuple(range(2, x.dim()))
    hidden = F.relu(F.linear(position_mean(x) if positions else x, squeeze, squeeze_bias))
    delta = torch.tanh(0.5 * F.linear(hidden, excite, excite_bias))  # 2 sigmoid(z) - 1 = tanh(z / 2)
    a, b = delta.view(len(x), 2, _K, -1, *(1 for _ in positions)).unbind(1)
    if beta is not None:
        a, b = beta * a, beta * b
    (a1, a2), (b1, b2) = a.unbind(1), (0.5 * b).unbind(1)
    return max_of_lines(x, 1 + a1, b1, a2, b2)


@activation.register("dyrelu-b")
class DyReLUB(nn.Module):
    """DyReLU-B: coefficients from the input, one set for each channel.

    `y_c = max_k (a_k^c(x) x_c + b_k^c(x))`, K = 2, with `a_k = alpha_k + delta`, `b_k = 0.5 delta`,
    alpha = (1, 0), and the deltas in [-1, 1] from the input's global average:
    `2 sigmoid(Linear(C//r, 2KC)(ReLU(Linear(C, C//r)(mean x)))) - 1` (Sec. 3.2), in the order a_1, a_2, b_1, b_2,
    each over all channels.

    Input and output: [N, C, ...], any number of positions (none: an MLP's hidden units); memory format is kept.

    Args:
        num_channels: C.
        reduction: r, at least 1; the hidden layer has at least one unit. Otherwise raises `UsageError`.
    """

    def __init__(self, num_channels: int, reduction: int = 4):
        super().__init__()
        if reduction < 1:
            raise UsageError(f"`reduction` must be at least 1, got {reduction}")
        hidden = max(1, num_channels // reduction)
        self.squeeze = nn.Linear(num_channels, hidden)
        self.excite = nn.Linear(hidden, 2 * _K * self._sets(num_channels))

    def _sets(self, num_channels: int) -> int:
        return num_channels

    def forward(self, x: Tensor, beta: Tensor | None = None) -> Tensor:
        """DyReLU of x; with `beta` (a scalar tensor) the coefficients are blended with those of ReLU, (1, 0, 0, 0)."""
        squeeze, excite = self.squeeze, self.excite
        return dynamic_relu(x, squeeze.weight, squeeze.bias, excite.weight, excite.bias, beta)


@activation.register("dyrelu-a")
class DyReLUA(DyReLUB):
    """DyReLU-A: as B, with one set of coefficients for all channels (Sec. 3.4)."""

    def _sets(self, num_channels: int) -> int:
        return 1


@activation.register("dyrelu-c")
class DyReLUC(DyReLUB):
    """DyReLU-C: as B, with coefficients scaled at each position by a spatial attention (Sec. 3.4).

    `pi = min(gamma softmax(z / 10), 1)` with z a 1x1 convolution of the input to one channel, the softmax over all
    HW positions and gamma = HW/3. An input without positions has no attention: C is then B.
    """

    def __init__(self, num_channels: int, reduction: int = 4):
        super().__init__(num_channels, reduction)
        self.spatial = nn.Conv1d(num_channels, 1, 1)

    def forward(self, x: Tensor, beta: Tensor | None = None) -> Tensor:
        y = super().forward(x, beta)
        if x.dim() == 2:
            return y
        z = self.spatial(x.flatten(2))
        attention = (z.shape[2] / 3 * torch.softmax(z / _TEMPERATURE, 2)).clamp(max=1)
        if beta is not None:
            attention = torch.lerp(torch.ones_like(attention), attention, beta)
        return y * attention.view(len(x), 1, *x.shape[2:])  # max_k (pi a x + pi b) = pi max_k (a x + b)
