"""Forward and backward of a training step as one CUDA graph, replayed step after step.

A step of a network for small images is hundreds of short operations, and what limits it is how fast Python hands them
to the GPU. A graph hands them over at once. A topology update needs no new one: masks are applied to the gradients
outside of it, and the gradients stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn

WARM_UP = 3  #: steps of one shape before it is captured: in them kernels are chosen and workspaces taken


class GraphedStep:
    """`compute(x, y)`, which makes the gradients of parameters and returns tensors, captured once and replayed.

    The first steps run as they are, on the graph's own stream, and so does a batch of another shape, as the last one
    of an epoch. What is returned, and the gradients, are overwritten by the next step.

    Args:
        compute: starts from no gradients (`zero_grad`) and ends with `backward()`; does the same operations every
            time, for one `phase`, and never waits for the device.
        parameters: gives the parameters at hand, anew for every capture.
        device: a CUDA device.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        parameters: Callable[[], Iterable[nn.Parameter]],
        device: torch.device,
    ):
        self._compute, self._parameters = compute, parameters
        self._stream = torch.cuda.Stream(device)
        self._phase: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._results: tuple[Tensor, ...] = ()
        self._x = self._y = torch.empty(0)
        self._forget()

    def __call__(self, x: Tensor, y: Tensor, phase: Hashable = None) -> tuple[Tensor, ...]:
        """`phase`: whatever `compute` depends on besides tensors; for another one it is captured anew."""
        if phase != self._phase:
            self._forget()
            self._phase = phase
        if self._graph is None and x.shape != self._x.shape:
            self._x, self._y, self._seen = torch.empty_like(x), torch.empty_like(y), 0
        if x.shape != self._x.shape or self._seen < WARM_UP:
            self._seen += 1
            return self._as_it_is(x, y)
        self._x.copy_(x)
        self._y.copy_(y)
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()
        for parameter, grad in self._grads:
            parameter.grad = grad
        torch.autograd.graph.increment_version([grad for _, grad in self._grads])  # a replay leaves no trace
        return self._results

    def _forget(self) -> None:
        self._graph, self._grads, self._results = None, [], ()
        self._x = self._y = torch.empty(0)
        self._seen = 0

    def _as_it_is(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self._compute(x, y)
        current.wait_stream(self._stream)
        for tensor in (x, y):
            tensor.record_stream(self._stream)
        for tensor in results:
            tensor.record_stream(current)
        return results

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._results = self._compute(self._x, self._y)
        self._grads = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        return graph
