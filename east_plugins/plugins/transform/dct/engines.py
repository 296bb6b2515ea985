"""How a DCT layer computes the product of its input with alpha D + S, and the choice by measurement.

`dense` forms alpha D + S in every forward pass and multiplies once. The other two never store D, and multiply only
the rows and columns of S that hold its nonzeros:
`fft` takes a DCT of every patch, O(n log n);
`separable` convolves twice, each time with a pointwise and a depthwise kernel: 2 channels x out multiplications a
position instead of channels x taps x out. A linear layer has one position, so that this is `fft` there.
`auto` takes the one measured fastest, training and inference apart, once for every geometry, size, dtype, device and
number of threads in a process.

Seen on one CPU thread at the paper's sparsities: separable wins for 3x3 kernels from 256 channels up, fft for pointwise
and linear layers with 2000 channels up; narrow layers stay dense. Training gains less than inference, since the
gradient to S, by which rules grow, is that to all of it.

The fast ones are for float32 and float64 and neither autocast nor torch.compile: dense is taken there. Engines agree
up to rounding; a run that must repeat to the bit names one, or sets `torch.use_deterministic_algorithms(True)`, with
which auto is dense. Transforms of torch.func need dense.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ....errors import UsageError
from . import transform
from .live import Live, find

if TYPE_CHECKING:
    from .layers import DCTLayer

logger = logging.getLogger(__name__)

NAMES = ("auto", "dense", "fft", "separable")

#: Shares of S's columns that are live, at which the fast engines are measured.
LIVE_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2)

#: Numbers of an input that are measured with, about.
SAMPLE = 2**20

#: A fast engine must take less than this share of the dense one's time to be taken.
MARGIN = 0.9

#: Calls that a layer whose S has too many live columns stays dense before S is looked at again.
REST = 31


class Plan(NamedTuple):
    """The engine measured fastest, a fast one while at most the share `limit` of S's columns is live."""

    engine: str
    limit: float = 0.0


_plans: dict[tuple, Plan] = {}


def check(name: str) -> str:
    """The name of an engine; raises `UsageError` for any other."""
    if name not in NAMES:
        raise UsageError(f"the engine of DCT layers must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def choose(layer: DCTLayer, input: Tensor) -> tuple[str, Live | None]:
    """The engine for this call, and for a fast one the live part of S."""
    if layer.engine == "dense" or not _supported(layer, input):
        return "dense", None
    if layer.engine != "auto":
        return layer.engine, find(layer.weight)
    if layer.groups > 1 or torch.are_deterministic_algorithms_enabled():
        return "dense", None
    if layer.resting:
        layer.resting -= 1
        return "dense", None
    plan = _plan(layer, input)
    if plan.engine == "dense":
        return "dense", None
    if live := find(layer.weight, plan.limit):
        return plan.engine, live
    layer.resting = REST
    return "dense", None


def _supported(layer: DCTLayer, input: Tensor) -> bool:
    return (
        input.dtype == layer.weight.dtype
        and input.dtype in (torch.float32, torch.float64)
        and input.dim() >= layer.weight.dim()
        and input.numel() > 0
        and not input.is_meta
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _plan(layer: DCTLayer, input: Tensor) -> Plan:
    gradients = torch.is_grad_enabled() and (input.requires_grad, layer.weight.requires_grad)
    key = (
        type(layer),
        layer.extra_repr(),
        input.numel().bit_length(),
        input.dtype,
        input.device,
        torch.get_num_threads(),
        gradients,
    )
    if key not in _plans:
        _plans[key] = _measure(layer, input)
        logger.info("%s(%s) on %s: %s", type(layer).__name__, layer.extra_repr(), tuple(input.shape), _plans[key])
    return _plans[key]


def _measure(layer: DCTLayer, input: Tensor) -> Plan:
    """The fastest engine at the least live share, one nonzero a column, and the greatest at which it beats dense."""
    originals = input, layer.weight, layer.alpha
    input = input.detach()[: max(1, SAMPLE * len(input) // input.numel())].clone()
    weight = torch.zeros(layer.weight.shape, dtype=input.dtype, device=input.device)
    alpha = layer.alpha.detach().clone()
    leaves = [
        tensor.requires_grad_()
        for tensor, original in zip((input, weight, alpha), originals, strict=True)
        if torch.is_grad_enabled() and original.requires_grad
    ]
    matrix = transform.matrix.__wrapped__(tuple(weight.shape), weight.dtype, weight.device)  # not kept

    def run(engine):
        if engine == "dense":
            output = layer.product(input, torch.addcmul(weight, matrix, alpha))
        else:
            live = find(weight)
            assert live is not None  # without a limit
            output = layer.fast_product(input, weight, alpha, engine, live)
        if leaves:
            torch.autograd.grad(output, leaves, torch.ones_like(output))

    dense = MARGIN * _seconds(run, "dense", input.device)
    engine, limit = "dense", 0.0
    candidates = ["fft"] if weight[0, 0].numel() == 1 else ["separable", "fft"]
    for share in LIVE_SHARES:
        columns = weight[0].numel()
        live = torch.arange(math.ceil(share * columns), device=weight.device)
        with torch.no_grad():
            weight.zero_().view(len(weight), -1)[live % len(weight), live * columns // len(live)] = 1
        seconds = {name: _seconds(run, name, input.device, 4 * dense) for name in candidates}
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] >= dense:
            break
        engine, limit, candidates = best, share, [best]
    return Plan(engine, limit)


def _seconds(run: Callable[[str], None], engine: str, device: torch.device, most: float = math.inf) -> float:
    """The least of some runs' times after a first one, infinity where one takes more than `most`."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # the former takes no notice of other processes
    times = []
    for _ in range(4):
        start = clock()
        run(engine)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(clock() - start)
        if times[-1] > most:
            return math.inf
    return min(times[1:])
