"""The command `bench step`: a whole training step, dense and sparse, in one process."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..commands.bench import Subject, interleaved, itop_host, report
from ..host.itop import CosineDecay
from ..host.masking import Masking
from ..ops.maskable import maskable
from ..plugins.activation import attach, factory
from ..sparse.engine import Engine
from ..training import models

MASKS = ("connected", "random", "trained")
UPDATES, BETWEEN, IMAGES = 20, 5, 32  # of the RigL run that `trained` masks come from


def step(args: Namespace) -> dict[str, Any]:
    """Whole training steps (forward, backward, host) of the same network, batch and masks; and the hosts alone.

    `with dense gradient` is forward and backward on the step before a topology update, without the update.

    `dense_over_sparse` is the step under ITOP-style dense masking, in the faster memory format, over ours with the
    sparse engine.
    """
    masks = _masks(args)
    x = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(args.device)
    labels = torch.arange(args.batch_size, device=args.device) % args.classes
    runs = {"dense, no masks": _Step(args, x, labels), "masked": _Step(args, x, labels, masks)}
    runs["masked, channels-last"] = _Step(args, x, labels, masks, channels_last=True)
    for engine in ("sparse", "auto"):
        runs[f"ours, {engine}"] = _Step(args, x, labels, masks, engine=engine)
    runs["ours, with dense gradient"] = _Step(args, x, labels, masks, engine="sparse", before_update=True)
    if args.itop:
        runs["itop"] = _Itop(args, x, labels)
    rows = interleaved(runs, args.repeats, x.device)
    median = {row["name"]: row["median_ms"] for row in rows}
    fastest = min(("masked", "masked, channels-last"), key=median.get)
    ratios = {
        "dense_over_sparse": (fastest, "ours, sparse"),
        "dense_over_auto": (fastest, "ours, auto"),
        "dense_over_gradient": (fastest, "ours, with dense gradient"),
        "itop_over_sparse": ("itop", "ours, sparse"),
    }
    hosts, host_ratios = _hosts(args)
    result = report([*rows, *hosts], ratios | host_ratios)
    result["memory_mib"] = {name: runs[name].memory() for name in ("masked", "ours, sparse")}
    return result


def _hosts(args: Namespace) -> tuple[list[dict], dict[str, tuple[str, str]]]:
    """The hosts' own share: `host.step()` and the dense model's `optimizer.step()`, gradients given."""
    dense, ours, plain = Subject(args), Subject(args), Subject(args)
    host, other = (
        subject.masked_by(Masking, growth_mode=args.growth, update_frequency=None) for subject in (ours, plain)
    )
    Engine(host, (3, 32, 32), "sparse")
    candidates: dict[str, Callable] = {
        "optimizer.step() alone": dense.optimizer.step,
        "host.step() alone": host.step,
        "the same, without an engine": other.step,
    }
    if args.itop:
        candidates["itop.step() alone"] = itop_host(args).step
    rows = interleaved(candidates, max(5, args.repeats), torch.device(args.device))
    return rows, {
        "host_over_optimizer": ("host.step() alone", "optimizer.step() alone"),
        "itop_over_optimizer": ("itop.step() alone", "optimizer.step() alone"),
        "itop_over_host": ("itop.step() alone", "host.step() alone"),
    }


class _Step:
    """One training step of a network of its own: plain, with ITOP-style masking, or with our host and an engine."""

    def __init__(
        self, args, x: Tensor, labels: Tensor, masks=None, engine: str | None = None, channels_last=False,
        before_update=False,
    ):  # fmt: skip
        self.model, self.optimizer = _network(args)
        self.x, self.labels, self.masks = x, labels, masks
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.x = x.contiguous(memory_format=torch.channels_last)
        if engine is not None:
            growth, frequency = ("gradient", 1) if before_update else (args.growth, None)
            host = Masking(self.optimizer, growth_mode=growth, update_frequency=frequency)
            host.add_module(self.model, density=args.density)
            for name, mask in masks.items():
                host.masks[name].copy_(mask)
            host.load_state_dict(host.state_dict())
            self.engine = Engine(host, (3, 32, 32), engine)
            self.update: Callable = (lambda: None) if before_update else host.step
        else:
            self.update = self.optimizer.step if masks is None else self._masked_update

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.labels).backward()
        self.update()

    @torch.no_grad()
    def _masked_update(self) -> None:
        self.optimizer.step()
        for name, weight in maskable(self.model).items():
            for tensor in (weight, self.optimizer.state[weight]["momentum_buffer"]):
                tensor.mul_(self.masks[name])

    def memory(self) -> dict[str, float]:
        """Optimizer state, and what a forward pass keeps for the backward one, without the parameters."""
        state = (t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        parameters = {parameter.data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            F.cross_entropy(self.model(self.x), self.labels)
        return {
            "optimizer_state": sum(t.numel() * t.element_size() for t in state) / 2**20,
            "kept_for_backward": sum(kept.values()) / 2**20,
        }


class _Itop:
    """The same with ITOP's own host, from a checkout."""

    def __init__(self, args: Namespace, x: Tensor, labels: Tensor):
        self.x, self.labels, self.host = x, labels, itop_host(args)

    def __call__(self) -> None:
        self.host.optimizer.zero_grad()
        F.cross_entropy(self.host.modules[0](self.x), self.labels).backward()
        self.host.step()


def _network(args: Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = models.build(args.model, args.classes).to(args.device)
    if args.activation:
        attach(model, factory(args.activation), (3, 32, 32))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def _masks(args: Namespace) -> dict[str, Tensor]:
    """Masks drawn connected or at random (ERK), or in the middle of a RigL run from random ones."""
    model, optimizer = _network(args)
    connected = args.masks == "connected"
    host = Masking(
        optimizer, growth_mode="gradient", update_frequency=BETWEEN, seed=0,
        death_rate_decay=CosineDecay(0.5, 2 * UPDATES * BETWEEN),
    )  # fmt: skip
    host.add_module(
        model, density=args.density, sparse_init="connected" if connected else "ERK", input_shape=(3, 32, 32)
    )
    if args.masks == "trained":
        engine = Engine(host, (3, 32, 32), "sparse")
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(args.classes, 3, 32, 32, generator=generator)
        for _ in range(UPDATES * BETWEEN):  # classes are patterns in noise
            labels = torch.randint(args.classes, (IMAGES,), generator=generator)
            x = patterns[labels] + torch.randn(IMAGES, 3, 32, 32, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(args.device)), labels.to(args.device)).backward()
            host.step()
        engine.remove()
    return {name: mask.clone() for name, mask in host.masks.items()}
