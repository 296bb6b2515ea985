"""Times of candidates that take turns in one process, their ratios, and both as text."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import __version__
from ..ops import text
from ..ops.doing import doing

SHORT = 0.1  # seconds


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Milliseconds of every candidate over `repeats` rounds, in turn within a round: median, minimum, maximum.

    One round goes before as warm-up. In its turn a candidate that takes less than `SHORT` runs for so long again, and
    the mean of these runs counts: the first one finds what the candidate before it left in the caches, as no run in a
    training does.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            doing(f"timing {name!r}, " + (f"round {turn} of {repeats}" if turn else "warm-up"))
            once = _seconds(run, 1, device)
            times[name].append(1000 * (once if once > SHORT else _seconds(run, math.ceil(SHORT / once), device)))
    rows = []
    for name, values in times.items():
        values = values[1:]
        rows.append(
            {"name": name, "median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}
        )
    return rows


def _seconds(run: Callable[[], Any], count: int, device: torch.device | str) -> float:
    """Of one run, where so many follow each other."""
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return (time.perf_counter() - began) / count


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Median milliseconds by name."""
    return {row["name"]: row["median_ms"] for row in rows}


def report(rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What `bench --json` prints: rows, ratios of medians, versions and thread count."""
    median = medians(rows)
    return {
        "rows": list(rows),
        "ratios": {n: median[a] / median[b] for n, (a, b) in ratios.items() if a in median and b in median},
        "versions": {"east_plugins": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The same for people: a table of milliseconds, one of ratios, and one of sizes where there are any."""
    times = [
        (row["name"], *(f"{row[f'{what}_ms']:.3f}" for what in ("median", "min", "max"))) for row in result["rows"]
    ]
    head = (f"ms, {result['threads']} thread{'s' * (result['threads'] > 1)}", "median", "min", "max")
    parts = [text.table(head, times, "<>>>")]
    if result["ratios"]:
        ratios = [(name, f"{value:.2f}") for name, value in result["ratios"].items()]
        parts.append(text.table(("ratio of medians", "times"), ratios, "<>"))
    if memory := result.get("memory_mib"):
        kinds = list(next(iter(memory.values())))
        rows = [(name, *(f"{sizes[kind]:.1f}" for kind in kinds)) for name, sizes in memory.items()]
        parts.append(text.table(("MiB", *(kind.replace("_", " ") for kind in kinds)), rows, "<" + ">" * len(kinds)))
    if sizes := result.get("sizes"):
        parts.append(text.table(("KiB", "size"), [(n, f"{size / 1024:,.1f}") for n, size in sizes.items()], "<>"))
    return "\n\n".join(parts)
