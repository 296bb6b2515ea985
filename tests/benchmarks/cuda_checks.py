"""The GPU checks: tests, training steps against dense ones, topology updates. Run by cuda.sh."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from east_plugins.errors import UsageError
from east_plugins.options import flags
from east_plugins.training import runs

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 530  # seconds, all parts together
TESTS = {  # seconds and files; what concerns a GPU most comes first
    "tests on CUDA": (160, ["tests/test_cuda.py"]),
    "tests of the host": (60, ["tests/host/test_masking.py", "tests/ops"]),
}
TINY_TESTS = {"tests of selection": (60, ["tests/ops/test_select.py"])}
STEPS = {"resnet34": 110, "resnet50": 130}
UPDATE = ("resnet50", 60)
COMPILED = {"resnet34": 500}  # most of it compiling
#: Most that is allowed, as a multiple of the dense step.
TARGETS = {
    "ours": 1.03, "ours, engine auto": 1.03, "EAST, DyReLU": 1.35, "EAST, DyReLU fading": 1.35, "EAST, after": 1.03,
}  # fmt: skip
UPDATE_TARGET_MS = 30


def run(command: list[str], seconds: float, log: Path) -> str:
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


def tests(name: str, seconds: float, files: list[str], out: Path) -> dict:
    log = out / (name.replace(" ", "-") + ".txt")
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *files]
    state = run(command, seconds, log)
    text = log.read_text() if log.is_file() else ""
    if "No module named pytest" in text or "No module named 'hypothesis'" in text:
        return {"state": "not run: pytest or hypothesis is not installed"}
    progress = "".join(re.findall(r"^([.sFExX]+) *(?:\[ *\d+%\])?$", text, re.MULTILINE))
    counts = {"passed": progress.count("."), "failed": progress.count("F") + progress.count("E"),
              "skipped": progress.count("s")}  # fmt: skip
    return {"state": state, **counts, "failures": re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)[:20]}


def measured(what: str, model: str, seconds: float, args, out: Path) -> dict:
    file = out / f"{what}-{model}.json"
    file.unlink(missing_ok=True)
    command = [str(ROOT / "tests/benchmarks/cuda_steps.py"), what, "--out", str(file), "--seconds", str(seconds * 0.6)]
    if args.tiny:
        command += "--model resnet34 --width 4 --batch-size 2 --density 0.05 --rounds 1 --inner 1".split()
        command += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    else:
        command += ["--model", model]
    command += ["--compiled"] * args.compiled
    if args.itop and what == "steps":
        command += ["--itop", str(args.itop.resolve())]
    state = run(command, seconds, out / f"{what}-{model}.txt")
    found = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    return {"state": state, **found}


def table(result: dict) -> str:
    lines = [f"{result['device']}, torch {result['torch']}, {result['seconds']:.0f} s" + ", tiny" * result["tiny"], ""]
    for name, part in result["tests"].items():
        counts = ", ".join(f"{part[key]} {key}" for key in ("passed", "failed", "skipped") if key in part)
        lines.append(f"{name:<22} {part['state']:<22} {counts}")
        lines += [f"  {failure}" for failure in part.get("failures", [])]
    lines += ["", f"{'training step':<32} {'ms':>9} {'issued ms':>10} {'ratio':>7} {'target':>7}"]
    for model, part in result["steps"].items():
        lines += [f"{model}: {part['state']}"] * (part["state"] != "ok")
        for name, row in part["rows"].items():
            target = judged(row["ratio"], TARGETS.get(name), result["tiny"])
            cells = f"{row['median_ms']:>9.2f} {row['issued_ms']:>10.2f} {row['ratio']:>7.3f}"
            lines.append(f"{model + ', ' + name:<32} {cells} {target}".rstrip())
        lines += [f"{model}, {name}: {reason}" for name, reason in part.get("failed", {}).items()]
    lines += ["", f"{'topology update':<32} {'ms':>9} {'waits':>10} {'':>7} {'target':>7}"]
    for model, part in result["updates"].items():
        lines += [f"{model}: {part['state']}"] * (part["state"] != "ok")
        for growth, row in part["rows"].items():
            waits = "" if row["synchronisations"] is None else row["synchronisations"]
            target = judged(row["median_ms"], UPDATE_TARGET_MS, result["tiny"])
            lines.append(f"{model + ', ' + growth:<32} {row['median_ms']:>9.2f} {waits:>10} {'':>7} {target}".rstrip())
    return "\n".join(lines)


def judged(value: float, most: float | None, tiny: bool) -> str:
    """The target and whether it is met; nothing for tiny networks, for which it is not meant."""
    return "" if most is None or tiny else f"{most:>7g} {'met' if value <= most else 'MISSED'}"


def main() -> int:
    parser = flags.Parser(prog="cuda.sh", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small networks, few tests; also without CUDA")
    parser.add_argument("--compiled", action="store_true", help="only training steps, all networks by torch.compile")
    parser.add_argument("--itop", type=Path, metavar="CHECKOUT", help="checkout of ITOP, to time its host beside ours")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda"), metavar="DIR", help="folder of the results")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device; allowed without one is --tiny")
    if args.itop and not (args.itop / "sparselearning" / "core.py").is_file():
        raise UsageError(f"--itop {args.itop} is no checkout of ITOP: it has no sparselearning/core.py")
    out, began = args.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    result = {"device": device, "torch": str(torch.__version__), "tiny": args.tiny, "tests": {}, "steps": {},
              "updates": {}}  # fmt: skip

    name = "cuda-compiled.json" if args.compiled else "cuda.json"

    def left(seconds: float) -> float:
        return min(seconds, LIMIT - (time.monotonic() - began))

    def note(kind: str, what: str, part: dict) -> None:
        result[kind][what] = part
        result["seconds"] = time.monotonic() - began
        runs.write_atomically(out / name, json.dumps(result, indent=1) + "\n")
        print(f"{result['seconds']:>5.0f} s  {kind}, {what}: {part['state']}", file=sys.stderr, flush=True)

    parts = COMPILED if args.compiled else STEPS
    if not args.compiled:
        model, seconds = ("resnet34" if args.tiny else UPDATE[0]), UPDATE[1]
        note("updates", model, measured("update", model, left(seconds), args, out))
    for model, seconds in list(parts.items())[: 1 if args.tiny else None]:
        note("steps", model, measured("steps", model, left(seconds), args, out))
    if not args.compiled:
        for title, (seconds, files) in (TINY_TESTS if args.tiny else TESTS).items():
            note("tests", title, tests(title, left(seconds), files, out))
    print(table(result))
    print(f"\nJSON: {out / name}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"cuda.sh: error: {error}", file=sys.stderr)
        sys.exit(2)
