"""The GPU checks: tests, training steps against dense ones, topology updates, each in a process of its own with a limit
to its time."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops import text
from ..training import runs
from . import gpu

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # of a checkout
LIMIT = 530  # seconds, all parts together
TESTS = {  # seconds and files; what concerns a GPU most comes first
    "tests on CUDA": (160, ["tests/test_cuda.py"]),
    "tests of the host": (60, ["tests/host/test_masking.py", "tests/ops"]),
}
TINY_TESTS = {"tests of selection": (60, ["tests/ops/test_select.py"])}
STEPS = {"resnet34": 110, "resnet50": 130}
UPDATE = ("resnet50", 60)
COMPILED = {"resnet34": 500}  # most of it compiling
GRAPHED = {"resnet34": 100, "resnet50": 120}
#: Most that is allowed, as a multiple of the dense step.
TARGETS = {
    "ours": 1.03, "ours, engine auto": 1.03, "EAST, DyReLU": 1.35, "EAST, DyReLU fading": 1.35, "EAST, after": 1.03,
}  # fmt: skip
UPDATE_TARGET_MS = 30


@dataclass(frozen=True)
class Wanted:
    """tiny: small networks and few tests, also without CUDA. how: "eager", or only training steps: "compiled" by
    torch.compile, "graphed" as CUDA graphs. itop: a checkout whose host is timed too."""

    out: Path
    tiny: bool = False
    how: str = "eager"
    itop: Path | None = None

    @property
    def file(self) -> Path:
        """That results are kept in."""
        return self.out / ("cuda.json" if self.how == "eager" else f"cuda-{self.how}.json")


def run(wanted: Wanted, note: Callable[[str], None]) -> dict[str, Any]:
    """All parts that there is time for; results are written after each, and `note` is given a line."""
    began = time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    result: dict[str, Any] = {
        "device": device, "torch": str(torch.__version__), "tiny": wanted.tiny, "tests": {}, "steps": {}, "updates": {},
    }  # fmt: skip

    def left(seconds: float) -> float:
        return min(seconds, LIMIT - (time.monotonic() - began))

    def keep(kind: str, what: str, part: dict[str, Any]) -> None:
        result[kind][what] = part
        result["seconds"] = time.monotonic() - began
        runs.write_atomically(wanted.file, json.dumps(result, indent=1) + "\n")
        note(f"{result['seconds']:>5.0f} s  {kind}, {what}: {part['state']}")

    parts = {"eager": STEPS, "compiled": COMPILED, "graphed": GRAPHED}[wanted.how]
    if wanted.how == "eager":
        model, seconds = ("resnet34" if wanted.tiny else UPDATE[0]), UPDATE[1]
        keep("updates", model, _measured("update", model, left(seconds), wanted))
    for model, seconds in list(parts.items())[: 1 if wanted.tiny else None]:
        keep("steps", model, _measured("steps", model, left(seconds), wanted))
    if wanted.how == "eager":
        for title, (seconds, files) in (TINY_TESTS if wanted.tiny else TESTS).items():
            keep("tests", title, _tested(title, left(seconds), files, wanted.out))
    return result


def _ended(command: list[str], seconds: float, log: Path) -> str:
    """ "ok", "exit N" or "stopped after N s"; output goes to `log`. The whole process group ends with it."""
    if seconds < 1:
        return "no time left"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            return "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tested(name: str, seconds: float, files: list[str], out: Path) -> dict[str, Any]:
    if not all((ROOT / file).exists() for file in files):
        return {"state": "not run: the tests lie in a checkout, and this package is installed without one"}
    log = out / (name.replace(" ", "-") + ".txt")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *files]
    state = _ended(command, seconds, log)
    printed = log.read_text() if log.is_file() else ""
    if "No module named pytest" in printed or "No module named 'hypothesis'" in printed:
        return {"state": "not run: pytest or hypothesis is not installed"}
    progress = "".join(re.findall(r"^([.sFExX]+) *(?:\[ *\d+%\])?$", printed, re.MULTILINE))
    counts = {"passed": progress.count("."), "failed": progress.count("F") + progress.count("E"),
              "skipped": progress.count("s")}  # fmt: skip
    return {"state": state, **counts, "failures": re.findall(r"^(?:FAILED|ERROR) .*", printed, re.MULTILINE)[:20]}


def _measured(what: str, model: str, seconds: float, wanted: Wanted) -> dict[str, Any]:
    file = wanted.out / f"{what}-{model}.json"
    file.unlink(missing_ok=True)
    tiny: dict[str, Any] = {}
    if wanted.tiny:
        tiny = dict(width=4, batch_size=2, density=0.05, rounds=1, inner=1)
        tiny["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    itop = str(wanted.itop.resolve()) if wanted.itop and what == "steps" else None
    setting = gpu.Setting(str(file), model, seconds=seconds * 0.6, itop=itop, how=wanted.how, **tiny)
    state = _ended(gpu.command(what, setting), seconds, wanted.out / f"{what}-{model}.txt")
    found = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    return {"state": state, **found}


def as_text(result: Mapping[str, Any]) -> str:
    """The results for people."""
    blocks = [f"{result['device']}, torch {result['torch']}, {result['seconds']:.0f} s" + ", tiny" * result["tiny"]]
    lines = []
    for name, part in result["tests"].items():
        counts = ", ".join(f"{part[key]} {key}" for key in ("passed", "failed", "skipped") if key in part)
        lines.append(f"{name:<22} {part['state']:<22} {counts}".rstrip())
        lines += [f"  {failure}" for failure in part.get("failures", [])]
    blocks += ["\n".join(lines)] * bool(lines)
    rows, remarks = [], []
    for model, part in result["steps"].items():
        remarks += [f"{model}: {part['state']}"] * (part["state"] != "ok")
        for name, row in part["rows"].items():
            judged = _judged(row["ratio"], TARGETS.get(name), result["tiny"])
            times = (f"{row[key]:.2f}" for key in ("median_ms", "issued_ms"))
            rows.append((f"{model}, {name}", *times, f"{row['ratio']:.3f}", judged))
        remarks += [f"{model}, {name}: {reason}" for name, reason in part.get("failed", {}).items()]
    blocks.append(text.table(("training step", "ms", "issued ms", "ratio", "most allowed"), rows, "<>>><"))
    blocks += ["\n".join(remarks)] * bool(remarks)
    rows, remarks = [], []
    for model, part in result["updates"].items():
        remarks += [f"{model}: {part['state']}"] * (part["state"] != "ok")
        for growth, row in part["rows"].items():
            waits = "" if row["synchronisations"] is None else str(row["synchronisations"])
            judged = _judged(row["median_ms"], UPDATE_TARGET_MS, result["tiny"])
            rows.append((f"{model}, {growth}", f"{row['median_ms']:.2f}", waits, judged))
    if result["updates"]:
        blocks.append(text.table(("topology update", "ms", "waits", "most ms allowed"), rows, "<>><"))
        blocks += ["\n".join(remarks)] * bool(remarks)
    return "\n\n".join(blocks)


def _judged(value: float, most: float | None, tiny: bool) -> str:
    """The target and whether it is met; nothing for tiny networks, for which it is not meant."""
    return "" if most is None or tiny else f"{most:g} {'met' if value <= most else 'MISSED'}"
