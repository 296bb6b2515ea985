"""Whether plans give a network's dense results: its outputs and gradients, in training and in evaluation."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..ops.modes import backward, forked_rng
from ..ops.paths import identity
from ..ops.substitute import substituted
from .layers import Sink

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Largest difference from the dense pass in float64, as a share of the largest number.
TOLERANCE = 1e-9

#: Relative change of all parameters, upwards and downwards, that tells how much of a difference is rounding, and how
#: often over that it may be.
NOISE, OFTEN = 1e-15, 1000


def unseen(function: Callable[[], T]) -> T:
    """What a function returns. It runs in a thread of its own where somebody keeps account of the tensors that this
    one saves for the backward pass, as checkpoints do."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class Result(NamedTuple):
    """A pass's outputs in one vector, and its gradients by the parameters' ids."""

    outputs: Tensor
    gradients: dict[int, Tensor]


class Check:
    """Passes of a small batch through a model, on copies of its parameters and buffers: nothing in it changes.

    Random numbers are the same in all passes, and dropout, whose draws depend on the number of channels, is left out.

    Args:
        forcing: makes the model's next passes those of given plans, None for dense ones.
        input_shape: of one input, of random numbers; inputs of integers are the first of the batch at hand.
    """

    def __init__(
        self,
        model: nn.Module,
        forcing: Callable[[Any], AbstractContextManager[None]],
        input_shape: Sequence[int],
    ):
        self.model, self.forcing, self.input_shape = model, forcing, tuple(input_shape)

    def agrees(
        self, plans: Mapping[nn.Module, Any], x: Tensor, masks: Mapping[int, Tensor], *, gradients: str = ""
    ) -> bool:
        """Whether plans and the dense computation agree in the model's present mode; masks are by their weights' ids.

        `gradients`: "" for outputs only, "active" for gradients of active weights too, "dense" for those of all.
        """
        for dtype, tolerance in ((torch.float64, TOLERANCE), (None, 1e-3)):
            try:
                dense = self.run(None, x, dtype, gradients)
            except Exception as error:  # a network that converts numbers itself
                logger.info("the dense network cannot be checked in %s: %s", dtype or "its own type", _line(error))
                continue
            try:
                ours = self.run(plans, x, dtype, gradients)
            except Exception as error:
                logger.info("the network cannot run on fewer channels: %s", _line(error))
                return False
            pairs = _pairs(dense, ours, masks if gradients == "active" else {})
            if all(_close(a, b, tolerance * size) for a, b, size in pairs):
                return True
            up, down = (_pairs(dense, self.run(None, x, dtype, gradients, noise=n), {}) for n in (NOISE, -NOISE))
            return all(
                _close(a, b, max(tolerance * size, OFTEN * _distance(c, d), OFTEN * _distance(c, e)))
                for (a, b, size), (c, d, _), (_, e, _) in zip(pairs, up, down, strict=True)
            )
        return False

    def run(
        self, plans: Mapping[nn.Module, Any] | None, x: Tensor, dtype: torch.dtype | None, gradients: str, noise=0.0
    ) -> Result:
        """One pass, backwards too where gradients are wanted; large numbers of rounding, as norms of constants make
        them, stay apart from errors in float64."""
        generator = torch.Generator().manual_seed(0)
        x = self._input(x, dtype, generator)
        leaves = {id(p): _copy(p, dtype, noise).requires_grad_(p.requires_grad) for p in self.model.parameters()}
        buffers = {id(buffer): _copy(buffer, dtype) for buffer in self.model.buffers()}
        sinks: dict[int, Sink] = {}
        apart = None if plans is None else {m: plan.apart(leaves, sinks) for m, plan in plans.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(forked_rng(x.device))
            torch.manual_seed(0)
            stack.enter_context(_exactly(x.device.type))
            stack.enter_context(substituted(self.model, leaves | buffers))
            stack.enter_context(torch.set_grad_enabled(self.model.training or bool(gradients)))
            stack.enter_context(self.forcing(apart))
            stack.enter_context(_NoDropout())
            found = tree_leaves(self.model(x))
            found = [t for t in found if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
            outputs = torch.cat([torch.view_as_real(t).flatten() if t.is_complex() else t.flatten() for t in found])
            if gradients and outputs.requires_grad:
                drawn = torch.randn(outputs.shape, generator=generator)
                backward(outputs, drawn.to(outputs))
        grads = {}
        for key, leaf in leaves.items():
            dense = sinks[key].dense if key in sinks and gradients == "dense" else None
            grad = leaf.grad if dense is None else dense
            grads[key] = torch.zeros_like(leaf) if grad is None else grad
        return Result(outputs.detach(), grads if gradients else {})

    def _input(self, x: Tensor, dtype: torch.dtype | None, generator: torch.Generator) -> Tensor:
        if not x.is_floating_point():
            return x.detach()[:2].clone()
        drawn = torch.randn(2, *self.input_shape, generator=generator, dtype=torch.float64)
        like = next(self.model.parameters())
        return drawn.to(x.device, dtype or like.dtype)


def _pairs(dense: Result, ours: Result, masks: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor, float]]:
    """Tensors to compare, and the size that differences are measured by."""
    theirs, found = (
        {key: grad * masks[key] if key in masks else grad for key, grad in result.gradients.items()}
        for result in (dense, ours)
    )
    largest = max((_size(grad) for grad in theirs.values()), default=0.0)
    compared = [(dense.outputs, ours.outputs, max(_size(dense.outputs), 1e-30))]
    for key, grad in theirs.items():
        compared.append((grad, found[key], max(_size(grad), 1e-3 * largest, 1e-30)))
    return compared


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    return _size(a - b) if a.shape == b.shape else math.inf


def _close(a: Tensor, b: Tensor, most: float) -> bool:
    return not math.isfinite(_size(a)) or (a.shape == b.shape and _distance(a, b) <= most)


def _copy(tensor: Tensor, dtype: torch.dtype | None, noise: float = 0.0) -> Tensor:
    tensor = tensor.detach().clone()
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor if dtype is None else tensor.to(dtype)
    if noise:
        drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tensor *= 1 + noise * drawn.to(tensor)
        if tensor.dim() == 1:  # shifts of norms are zero at first: there rounding decides on which side of the kink
            tensor[tensor == 0] = noise  # of a ReLU a constant channel lies
    return tensor


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if "dropout" in name and hasattr(torch.nn.functional, name.strip("_")):
            return identity(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _exactly(device_type: str) -> Iterator[None]:
    """Inside, results depend on rounding only: no autocast, and no cuDNN, which takes TF32 for some shapes."""
    with torch.autocast(device_type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        yield


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
