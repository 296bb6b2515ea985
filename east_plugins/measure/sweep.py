"""A training step at many densities: dense under masks, ours, SparseProp, and what the arithmetic alone would take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..ops import text
from ..ops.doing import doing
from .costs import costs
from .networks import Subject
from .step import Step, by_sparseprop, dense_masked, with_engine
from .timing import interleaved, medians, report

DENSE, OURS, SPARSEPROP = "dense, masked", "ours", "SparseProp"


def sweep(
    subject: Subject,
    densities: Sequence[float],
    batch_size: int = 32,
    repeats: int = 3,
    sparseprop: Path | None = None,
) -> dict[str, Any]:
    """For each density the median milliseconds of a whole step by name, the `limit_ms` of its arithmetic, and the MiB
    of a step's memory at its peak.

    Dense: under ITOP-style masking, channels-last. Ours: engine "auto". The limit: forward, input gradient and weight
    gradient of the active weights, at the speed of a product of dense matrices on this machine. Raises `UsageError`
    for densities that are not in (0, 1].
    """
    if wrong := [density for density in densities if not 0 < density <= 1]:
        raise UsageError(f"`densities` must be in (0, 1], got {wrong[0]:g}")
    speed, rows = flops(), []
    for density in densities:
        doing(f"making the networks of density {density:g}")
        at = dataclasses.replace(subject, density=density)
        runs: dict[str, Step] = {DENSE: dense_masked(at, batch_size, channels_last=True)}
        runs[OURS] = with_engine(at, batch_size, "gradient", "auto")
        if sparseprop:
            runs[SPARSEPROP] = by_sparseprop(at, batch_size, sparseprop)
        nonzeros = {name: int(mask.sum()) for name, mask in at.drawn.items()}
        macs = costs(at.build().model, at.shape, nonzeros).sparse_macs
        median = medians(interleaved(runs, repeats, subject.device))
        limit = 1000 * 3 * 2 * macs * batch_size / speed
        peak = {name: run.peak() for name, run in runs.items()}
        rows.append({"density": density, "median_ms": median, "limit_ms": limit, "peak_mib": peak})
    facts = {"batch_size": batch_size, "masks": subject.masks, "gflops": speed / 1e9}
    return {**report([], {}), **facts, "rows": rows}


def flops(size: int = 1024, repeats: int = 15) -> float:
    """Floating-point operations a second of a product of two dense float32 matrices, by PyTorch's present threads."""
    a, b, times = torch.rand(size, size), torch.rand(size, size), []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def as_text(result: dict[str, Any]) -> str:
    """The same for people."""
    names = list(result["rows"][0]["median_ms"])
    head = ("density", *names, "arithmetic alone", *(f"{name} over ours" for name in names if name != OURS))
    head += tuple(f"{name}, MiB" for name in names)
    rows = []
    for row in result["rows"]:
        ms, ours = row["median_ms"], row["median_ms"][OURS]
        ratios = (f"{ms[name] / ours:.2f}" for name in names if name != OURS)
        rows.append((f"{row['density']:g}", *(f"{ms[n]:.1f}" for n in names), f"{row['limit_ms']:.2f}", *ratios,
                     *(f"{row['peak_mib'][n]:.0f}" for n in names)))  # fmt: skip
    about = f"ms a step of {result['batch_size']} images, masks {result['masks']}, {result['threads']} thread(s); "
    about += f"arithmetic at {result['gflops']:.0f} GFLOP/s, ratios in times; MiB of a step at its peak"
    return f"{about}\n\n{text.table(head, rows, '>' * len(head))}"
