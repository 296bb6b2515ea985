"""Training steps and topology updates on one device: times as JSON, written anew after every round."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from east_plugins.commands.bench import itop_core
from east_plugins.host.itop import CosineDecay
from east_plugins.host.masking import Masking
from east_plugins.plugins import registry
from east_plugins.plugins.activation import factory
from east_plugins.plugins.activation.phased import attach
from east_plugins.sparse import Engine
from east_plugins.training import models, runs

SHAPE = (3, 32, 32)


class Step:
    """Training steps of a network of its own: bfloat16 autocast, channels-last, fused SGD with momentum.

    kind: "dense"; "ours" with an engine; "east" with sharing and DyReLU at `beta` (0: the phase is over); "itop".
    """

    def __init__(self, args: argparse.Namespace, kind: str, engine: str = "dense", beta: float = 0.0):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.model = models.build(args.model, 10, width=args.width)
        if kind == "east":
            registry.transform.get("share")(self.model, 2)
        self.model.to(self.device, memory_format=torch.channels_last)
        phased = attach(self.model, factory("dyrelu-b"), SHAPE) if beta else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        self.update: Callable = self.optimizer.step
        if kind in ("ours", "east"):
            host = Masking(self.optimizer, growth_mode="gradient", update_frequency=None, seed=0)
            host.add_module(self.model, density=args.density, sparse_init="connected", input_shape=SHAPE)
            self.engine, self.update = Engine(host, SHAPE, engine), host.step
        if kind == "itop":
            self.update = self._itop(args).step
        if phased:
            phased.set_beta(beta)
        self.forward = torch.compile(self.model) if args.compiled else self.model
        self.x = torch.randn(args.batch_size, *SHAPE, device=self.device).to(memory_format=torch.channels_last)
        self.labels = torch.arange(args.batch_size, device=self.device) % 10

    def _itop(self, args: argparse.Namespace):
        core = itop_core(args.itop)
        settings = argparse.Namespace(fix=False, update_frequency=10**9)
        host = core.Masking(
            self.optimizer, death_rate=0.5, death_mode="magnitude", growth_mode="gradient", redistribution_mode="none",
            death_rate_decay=CosineDecay(0.5, 1000), args=settings,
        )  # fmt: skip
        host.add_module(self.model, density=args.density, sparse_init="ERK")
        return host

    def __call__(self, count: int) -> tuple[float, float]:
        """Milliseconds a step over `count` steps: until the device is done, and until the host is."""
        wait(self.device)
        began = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.forward(self.x), self.labels)
            loss.backward()
            self.update()
        issued = time.perf_counter()
        wait(self.device)
        return 1000 * (time.perf_counter() - began) / count, 1000 * (issued - began) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def candidates(args: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    found = {
        "dense": lambda: Step(args, "dense"),
        "ours": lambda: Step(args, "ours"),
        "ours, engine auto": lambda: Step(args, "ours", "auto"),
        "EAST, DyReLU": lambda: Step(args, "east", beta=1.0),
        "EAST, DyReLU fading": lambda: Step(args, "east", beta=0.5),
        "EAST, after": lambda: Step(args, "east"),
    }
    if args.compiled:
        del found["ours, engine auto"]  # its sparse passes are compiled in their own way
        del found["EAST, DyReLU fading"]  # as long as in its phase, and a minute to compile
    if args.itop:
        found["ITOP"] = lambda: Step(args, "itop")
    return found


def steps(args: argparse.Namespace) -> None:
    """All candidates in turn, round after round while time is left; medians over rounds, ratios to dense."""
    ends = time.monotonic() + args.seconds
    result = {"model": args.model, "rows": {}, "failed": {}, **machine(args)}
    ready = {}
    for name, build in candidates(args).items():
        try:
            ready[name] = build()
            ready[name](3)  # warm-up: kernels chosen, optimizer state there, `auto` has measured
        except Exception as error:  # the others are still worth measuring
            ready.pop(name, None)
            result["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        write(args.out, result)
    if "dense" not in ready:
        raise SystemExit(f"dense: {result['failed']['dense']}")
    times = {name: [] for name in ready}
    while not times["dense"] or (len(times["dense"]) < args.rounds and time.monotonic() < ends):
        for name, step in ready.items():
            times[name].append(step(args.inner))
        dense = statistics.median(total for total, _ in times["dense"])
        for name, pairs in times.items():
            median, issued = (statistics.median(values) for values in zip(*pairs, strict=True))
            result["rows"][name] = {
                "median_ms": median, "issued_ms": issued, "min_ms": min(total for total, _ in pairs),
                "ratio": median / dense, "rounds": len(pairs),
            }  # fmt: skip
        write(args.out, result)


def update(args: argparse.Namespace) -> None:
    """Topology updates from fresh dense gradients, and how often the host waits for the device in one."""
    ends = time.monotonic() + args.seconds
    device, result = torch.device(args.device), {"model": args.model, "rows": {}, **machine(args)}
    for growth in ("gradient", "random"):
        torch.manual_seed(0)
        model = models.build(args.model, 10, width=args.width).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, fused=True)
        host = Masking(optimizer, death_rate=0.5, growth_mode=growth, update_frequency=None, seed=0)
        host.add_module(model, density=args.density)
        draw(model)
        host.step()  # gives the optimizer its state
        times = []
        for _ in range(args.rounds + 2):
            draw(model)
            wait(device)
            began = time.perf_counter()
            host.truncate_weights()
            wait(device)
            times.append(1000 * (time.perf_counter() - began))
            if time.monotonic() > ends and len(times) > 2:
                break
        draw(model)
        row = {"median_ms": statistics.median(times[2:]), "min_ms": min(times), "rounds": len(times) - 2}
        result["rows"][growth] = {**row, "synchronisations": synchronisations(host.truncate_weights, device)}
        write(args.out, result)


def draw(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def synchronisations(function: Callable, device: torch.device) -> int | None:
    """How many times `function` waits for the device; None where that cannot be told."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def machine(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": str(torch.__version__), "batch_size": args.batch_size, "density": args.density}


def write(path: Path, result: dict) -> None:
    runs.write_atomically(path, json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "update"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.0005)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--inner", type=int, default=10, help="steps between two looks at the clock")
    parser.add_argument("--seconds", type=float, default=60, help="no new round after so many")
    parser.add_argument("--itop", type=Path)
    parser.add_argument("--compiled", action="store_true", help="networks by torch.compile")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    {"steps": steps, "update": update}[args.what](args)


if __name__ == "__main__":
    main()
