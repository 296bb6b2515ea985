"""A whole training step, dense and sparse, in one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..ops.maskable import maskable
from ..sparse.engine import Engine
from ..training.graphed import GraphedStep
from .networks import Network, Subject, with_gradients
from .published import swap_in_sparseprop
from .timing import interleaved, medians, report

#: ITOP-style dense masking, and whether channels-last.
DENSE_MASKED = {"masked": False, "masked, channels-last": True}


def step(
    subject: Subject,
    batch_size: int = 128,
    growth: str = "gradient",
    repeats: int = 3,
    itop: Path | None = None,
    sparseprop: Path | None = None,
) -> dict[str, Any]:
    """Whole training steps (forward, backward, host) of the same network, batch and masks; and the hosts alone.

    `with dense gradient` is forward and backward on the step before a topology update, without the update.

    `dense_over_sparse` is the step under ITOP-style dense masking, in the faster memory format, over ours with the
    sparse engine.
    """
    runs = _candidates(subject, batch_size, growth)
    if itop:
        network = subject.build()
        runs["itop"] = Step(network, network.itop(itop, growth).step, batch_size)
    if sparseprop:
        runs["sparseprop"] = by_sparseprop(subject, batch_size, sparseprop)
    rows = interleaved(runs, repeats, subject.device)
    median = medians(rows)
    fastest = min(DENSE_MASKED, key=lambda name: median[name])
    ratios = {
        "dense_over_sparse": (fastest, "ours, sparse"),
        "dense_over_auto": (fastest, "ours, auto"),
        "dense_over_gradient": (fastest, "ours, with dense gradient"),
        "itop_over_sparse": ("itop", "ours, sparse"),
        "sparseprop_over_sparse": ("sparseprop", "ours, sparse"),
        "sparseprop_over_auto": ("sparseprop", "ours, auto"),
    }
    hosts, host_ratios = _hosts(subject, growth, max(5, repeats), itop)
    result = report([*rows, *hosts], ratios | host_ratios)
    measured = ("masked", "ours, sparse", "sparseprop")
    result["memory_mib"] = {name: runs[name].memory() for name in measured if name in runs}
    return result


def _candidates(subject: Subject, batch_size: int, growth: str) -> dict[str, Step]:
    masks, plain = subject.drawn, subject.build()
    runs = {"dense, no masks": Step(plain, plain.optimizer.step, batch_size)}
    for name, channels_last in DENSE_MASKED.items():
        runs[name] = dense_masked(subject, batch_size, channels_last)
    for engine in ("sparse", "auto"):
        runs[f"ours, {engine}"] = with_engine(subject, batch_size, growth, engine)
    network = subject.build()
    Engine(network.masked(masks, "gradient", 1), subject.shape, "sparse")  # every step is before an update
    runs["ours, with dense gradient"] = Step(network, lambda: None, batch_size)
    return runs


def _hosts(
    subject: Subject, growth: str, repeats: int, itop: Path | None
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """The hosts' own share: `host.step()` and the dense model's `optimizer.step()`, gradients given."""
    host, other = (with_gradients(subject).masked("ERK", growth) for _ in range(2))
    Engine(host, subject.shape, "sparse")
    candidates: dict[str, Callable[[], Any]] = {
        "optimizer.step() alone": with_gradients(subject).optimizer.step,
        "host.step() alone": host.step,
        "the same, without an engine": other.step,
    }
    if itop:
        candidates["itop.step() alone"] = with_gradients(subject).itop(itop, growth).step
    rows = interleaved(candidates, repeats, subject.device)
    return rows, {
        "host_over_optimizer": ("host.step() alone", "optimizer.step() alone"),
        "itop_over_optimizer": ("itop.step() alone", "optimizer.step() alone"),
        "itop_over_host": ("itop.step() alone", "host.step() alone"),
    }


class Step:
    """One training step of a network: forward, backward, and `update`.

    With `autocast`, forward is in bfloat16; `how` it is computed: "compiled" by torch.compile, "graphed" with backward
    as one CUDA graph.
    """

    def __init__(
        self, network: Network, update: Callable[[], Any], batch_size: int, channels_last: bool = False,
        autocast: bool = False, how: str = "eager",
    ):  # fmt: skip
        self.model, self.optimizer, self.update = network.model, network.optimizer, update
        self.x, self.labels = network.subject.images(batch_size)
        if channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.autocast = autocast
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if how == "compiled" else self.model
        self.gradients: Callable[[Tensor, Tensor], Any] = self._gradients
        if how == "graphed":
            self.gradients = GraphedStep(self._gradients, self.model.parameters, self.x.device)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.forward(x), labels)

    def _gradients(self, x: Tensor, labels: Tensor) -> tuple[Tensor]:
        self.optimizer.zero_grad()
        loss = self.loss(x, labels)
        loss.backward()
        return (loss.detach(),)

    def __call__(self) -> None:
        self.gradients(self.x, self.labels)
        self.update()

    def peak(self) -> float:
        """MiB of tensors at the peak of a step, over those that are there between steps."""
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            self()
        events = watched.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(itertools.accumulate((change for _, change in changes), initial=0)) / 2**20

    def memory(self) -> dict[str, float]:
        """MiB of optimizer state, of what a forward pass keeps for the backward one, without the parameters, and
        `peak`."""
        state = (t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        parameters = {parameter.data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss(self.x, self.labels)
        return {
            "optimizer_state": sum(t.numel() * t.element_size() for t in state) / 2**20,
            "kept_for_backward": sum(kept.values()) / 2**20,
            "peak_of_step": self.peak(),
        }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what PyTorch's profiler writes to standard error about itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def dense_masked(subject: Subject, batch_size: int, channels_last: bool = False) -> Step:
    """Under dense masking, as ITOP does it."""
    network = subject.build(channels_last)
    return Step(network, dense_masking(network, subject.drawn), batch_size, channels_last)


def with_engine(subject: Subject, batch_size: int, growth: str, engine: str) -> Step:
    """Under our host with an engine, between topology updates."""
    network = subject.build()
    return Step(network, ours(network, subject.drawn, growth, engine), batch_size)


def by_sparseprop(subject: Subject, batch_size: int, checkout: Path) -> Step:
    """With SparseProp's layers where it finds them faster; weights of the layers that it leaves dense are masked."""
    network = subject.build()
    with torch.no_grad():
        for name, weight in maskable(network.model).items():
            weight.mul_(subject.drawn[name])
    swap_in_sparseprop(checkout, network.model, (batch_size, *subject.shape))
    settings = {name: network.optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")}
    network.optimizer = torch.optim.SGD(network.model.parameters(), **settings)
    return Step(network, dense_masking(network, subject.drawn), batch_size)


def ours(network: Network, masks: str | Mapping[str, Tensor], growth: str, engine: str) -> Callable[[], Any]:
    """What updates a network under our host with an engine, between topology updates."""
    host = network.masked(masks, growth)
    Engine(host, network.subject.shape, engine)
    return host.step


def dense_masking(network: Network, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """What updates a network as ITOP does it: optimizer, then weights and momentum times their masks."""
    weights, optimizer = maskable(network.model), network.optimizer

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        for name, weight in weights.items():
            for tensor in (weight, optimizer.state[weight]["momentum_buffer"]):
                tensor.mul_(masks[name])

    return update
