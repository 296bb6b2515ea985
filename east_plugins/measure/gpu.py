"""Training steps and topology updates on one device: times as JSON, written anew after every round.

`python -m east_plugins.measure.gpu PART SETTING` measures in a process of its own, SETTING being JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..training import runs
from .networks import Subject
from .step import Step, ours
from .timing import wait


@dataclass(frozen=True)
class Setting:
    """What is measured, and for how long; `inner` steps lie between two looks at the clock."""

    out: str
    model: str
    device: str = "cuda"
    width: int | None = None
    batch_size: int = 128
    density: float = 0.0005
    rounds: int = 15
    inner: int = 10
    seconds: float = 60
    itop: str | None = None
    how: str = "eager"  # or "compiled", "graphed"

    def subject(self, **more: Any) -> Subject:
        return Subject(self.model, 10, self.density, width=self.width, device=self.device, **more)

    def facts(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "CPU"
        return {
            "model": self.model, "rows": {}, "device": name, "torch": str(torch.__version__),
            "batch_size": self.batch_size, "density": self.density,
        }  # fmt: skip

    def write(self, result: dict[str, Any]) -> None:
        runs.write_atomically(Path(self.out), json.dumps(result, indent=1) + "\n")


def training_step(setting: Setting, kind: str, engine: str = "dense", beta: float = 0.0) -> Step:
    """A step in bfloat16 autocast, channels-last, by fused SGD with momentum.

    kind: "dense"; "ours" with an engine; "east" with sharing and DyReLU at `beta` (0: the phase is over); "itop".
    """
    subject = setting.subject(share=kind == "east", activation="dyrelu-b" if beta else None)
    network = subject.build(channels_last=True, fused=True)
    update: Callable[[], Any] = network.optimizer.step
    if kind in ("ours", "east"):
        update = ours(network, "connected", "gradient", engine)
    if kind == "itop":
        update = network.itop(Path(str(setting.itop)), "gradient").step
    if network.phased:
        network.phased.set_beta(beta)
    return Step(network, update, setting.batch_size, True, autocast=True, how=setting.how)


def timed(step: Step, count: int) -> tuple[float, float]:
    """Milliseconds a step over `count` steps: until the device is done, and until the host is."""
    device = step.x.device
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    issued = time.perf_counter()
    wait(device)
    return 1000 * (time.perf_counter() - began) / count, 1000 * (issued - began) / count


def candidates(setting: Setting) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {
        "dense": lambda: training_step(setting, "dense"),
        "ours": lambda: training_step(setting, "ours"),
        "ours, engine auto": lambda: training_step(setting, "ours", "auto"),
        "EAST, DyReLU": lambda: training_step(setting, "east", beta=1.0),
        "EAST, DyReLU fading": lambda: training_step(setting, "east", beta=0.5),
        "EAST, after": lambda: training_step(setting, "east"),
    }
    if setting.how != "eager":
        del found["ours, engine auto"]  # its sparse passes are compiled in their own way
    if setting.how == "compiled":
        del found["EAST, DyReLU fading"]  # as long as in its phase, and a minute to compile
    if setting.itop:
        found["ITOP"] = lambda: training_step(setting, "itop")
    return found


def steps(setting: Setting) -> None:
    """All candidates in turn, round after round while time is left; medians over rounds, ratios to dense."""
    ends = time.monotonic() + setting.seconds
    result: dict[str, Any] = {**setting.facts(), "failed": {}}
    ready: dict[str, Step] = {}
    for name, build in candidates(setting).items():
        try:
            ready[name] = build()
            timed(ready[name], 3)  # warm-up: kernels chosen, optimizer state there, `auto` has measured
        except Exception as error:  # the others are still worth measuring
            ready.pop(name, None)
            result["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        setting.write(result)
    if "dense" not in ready:
        raise SystemExit(f"dense: {result['failed']['dense']}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    while not times["dense"] or (len(times["dense"]) < setting.rounds and time.monotonic() < ends):
        for name, step in ready.items():
            times[name].append(timed(step, setting.inner))
        dense = statistics.median(total for total, _ in times["dense"])
        for name, pairs in times.items():
            median, issued = (statistics.median(values) for values in zip(*pairs, strict=True))
            result["rows"][name] = {
                "median_ms": median, "issued_ms": issued, "min_ms": min(total for total, _ in pairs),
                "ratio": median / dense, "rounds": len(pairs),
            }  # fmt: skip
        setting.write(result)


def update(setting: Setting) -> None:
    """Topology updates from fresh dense gradients, and how often the host waits for the device in one."""
    ends, result = time.monotonic() + setting.seconds, setting.facts()
    for growth in ("gradient", "random"):
        network = setting.subject().build(lr=1e-6, weight_decay=0.0, fused=True)
        host = network.masked("ERK", growth, death_rate=0.5)
        network.draw_gradients()
        host.step()  # gives the optimizer its state
        times: list[float] = []
        for _ in range(setting.rounds + 2):
            network.draw_gradients()
            wait(setting.device)
            began = time.perf_counter()
            host.truncate_weights()
            wait(setting.device)
            times.append(1000 * (time.perf_counter() - began))
            if time.monotonic() > ends and len(times) > 2:
                break
        network.draw_gradients()
        row = {"median_ms": statistics.median(times[2:]), "min_ms": min(times), "rounds": len(times) - 2}
        waits = synchronisations(host.truncate_weights, torch.device(setting.device))
        result["rows"][growth] = {**row, "synchronisations": waits}
        setting.write(result)


def synchronisations(function: Callable[[], Any], device: torch.device) -> int | None:
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


PARTS = {"steps": steps, "update": update}


def command(part: str, setting: Setting) -> list[str]:
    """The words behind `python` that measure a part in a process of its own."""
    return ["-m", __spec__.name, part, json.dumps(dataclasses.asdict(setting))]


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    PARTS[sys.argv[1]](Setting(**json.loads(sys.argv[2])))
