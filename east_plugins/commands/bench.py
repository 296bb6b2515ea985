"""The command `bench`: timings as ratios, candidates interleaved in one process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UnknownNameError, UsageError
from ..host.masking import Masking
from ..ops import memory
from ..ops.maskable import maskable
from ..options import flags
from ..training import models, runs

WHAT = ("step", "update", "inference")


def interleaved(candidates: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> list[dict]:
    """Milliseconds of every candidate over `repeats` rounds, in turn within a round: median, minimum, maximum.

    One round goes before as warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            _wait_for(device)
            began = time.perf_counter()
            run()
            _wait_for(device)
            times[name].append(1000 * (time.perf_counter() - began))
    rows = []
    for name, values in times.items():
        values = values[1:]
        rows.append(
            {"name": name, "median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
        )
    return rows


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What `bench --json` prints: rows, ratios of medians, versions and thread count."""
    median = {row["name"]: row["median_ms"] for row in rows}
    return {
        "rows": list(rows),
        "ratios": {n: median[a] / median[b] for n, (a, b) in ratios.items() if a in median and b in median},
        "versions": {"east_plugins": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"{'':<28} {'median':>10} {'min':>10} {'max':>10}   ms, {result['threads']} threads"]
    for row in result["rows"]:
        lines.append(f"{row['name']:<28} {row['median_ms']:>10.3f} {row['min_ms']:>10.3f} {row['max_ms']:>10.3f}")
    lines += [f"{name:<28} {value:>10.2f}" for name, value in result["ratios"].items()]
    for name, parts in result.get("memory_mib", {}).items():
        lines.append(f"{name:<28} " + ", ".join(f"{part} {mib:.1f} MiB" for part, mib in parts.items()))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: east_plugins bench {{{','.join(WHAT)}}} [flags]   (bench step --help lists them)")
        return 0 if argv else 2
    if argv[0] not in WHAT:
        raise UnknownNameError("benchmark", argv[0], WHAT)
    if argv[0] == "inference":
        return importlib.import_module("east_plugins.measure.inference").main(argv[1:])
    parser = flags.Parser(prog=f"east_plugins bench {argv[0]}", description=_HELP[argv[0]])
    add = parser.add_argument
    add("--model", default="resnet34", metavar="NAME", help="network (default: resnet34)")
    add("--classes", type=int, default=100, metavar="N", help="its outputs (default: 100)")
    if argv[0] == "step":
        add("--batch-size", type=int, default=128, metavar="N", help="images of 3x32x32 a step (default: 128)")
        add(
            "--masks",
            default="connected",
            choices=["connected", "random", "trained"],
            help="drawn connected, drawn at random (ERK), or those of 20 updates into a RigL run (default: connected)",
        )
        add("--activation", metavar="NAME", help="in place of every ReLU, undiluted, e.g. dyrelu-b (default: ReLU)")
    add("--density", type=float, default=0.0005, metavar="X", help="active share of the weights (default: 0.0005)")
    add("--growth", default="gradient", metavar="NAME", help="growth rule (default: gradient)")
    rounds = 3 if argv[0] == "step" else 15
    add("--repeats", type=int, default=rounds, metavar="N", help=f"rounds (default: {rounds})")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (default: cpu)")
    add("--itop", type=Path, metavar="DIR", help="checkout of ITOP, to time its host beside ours")
    add("--json", action="store_true", help="one JSON object in place of the table")
    args = parser.parse_args(argv[1:])
    for name in ("repeats", "threads", "classes", "batch_size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    runs.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        memory.keep_freed()  # as in training; for all candidates
    run = update if argv[0] == "update" else importlib.import_module("east_plugins.measure.step").step
    result = run(args)
    print(json.dumps(result) if args.json else as_text(result))
    return 0


_HELP = {
    "step": "Whole training steps, dense, masked as ITOP does it, and with our sparse engine (SGD, momentum, weight "
    "decay); then the hosts' step() alone.",
    "update": "A topology update of our host against the dense model's optimizer.step().",
}


def update(args: Namespace) -> dict[str, Any]:
    """`host.truncate_weights()` from fresh dense gradients (ratio update_over_optimizer)."""
    dense, ours = Subject(args), Subject(args)
    host = ours.masked_by(Masking, growth_mode=args.growth, death_rate=0.5)
    host.step()  # gives optimizer state and running averages their tensors
    ours.draw_gradients()
    candidates = {"optimizer": dense.optimizer.step, "host": host.truncate_weights}
    if args.itop:
        candidates["itop"] = itop_host(args).truncate_weights
    rows = interleaved(candidates, args.repeats, torch.device(args.device))
    names = {"update_over_optimizer": ("host", "optimizer"), "itop_over_optimizer": ("itop", "optimizer")}
    return report(rows, names)


class Subject:
    """A network with gradients and an optimizer that has run once."""

    def __init__(self, args: Namespace):
        torch.manual_seed(0)
        self.args = args
        self.model = models.build(args.model, args.classes).to(args.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
        self.draw_gradients()
        self.optimizer.step()

    def draw_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)

    def masked_by(self, host_class: Callable, **kwargs):
        host = host_class(self.optimizer, redistribution_mode="none", **kwargs)
        host.add_module(self.model, density=self.args.density, sparse_init="ERK")
        assert len(maskable(self.model)) == len(host.masks)
        return host


def itop_core(checkout: Path):
    """ITOP's module of hosts, from a checkout; silent, on a machine without CUDA too."""
    file = checkout / "sparselearning" / "core.py"
    if not file.is_file():
        raise UsageError(f"--itop {checkout} is no checkout of ITOP: it has no sparselearning/core.py")
    spec = importlib.util.spec_from_file_location("itop_core", file)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    core.print = lambda *args: None
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    return core


def itop_host(args: Namespace):
    """ITOP's own host with the same network and gradients."""
    core, subject = itop_core(args.itop), Subject(args)
    itop_args = Namespace(fix=False, update_frequency=sys.maxsize)
    decay = core.CosineDecay(0.5, 1000)
    return subject.masked_by(
        core.Masking, growth_mode=args.growth, death_rate=0.5, args=itop_args, death_rate_decay=decay
    )
