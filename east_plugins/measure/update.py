"""A topology update, beside the dense model's optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .networks import Subject, with_gradients
from .timing import interleaved, report


def update(subject: Subject, growth: str = "gradient", repeats: int = 15, itop: Path | None = None) -> dict[str, Any]:
    """`host.truncate_weights()` from fresh dense gradients (ratio update_over_optimizer), from ERK's masks."""
    dense, ours = with_gradients(subject), with_gradients(subject)
    host = ours.masked("ERK", growth, 100, death_rate=0.5)
    host.step()  # gives optimizer state and running averages their tensors
    ours.draw_gradients()
    candidates: dict[str, Callable[[], Any]] = {"optimizer": dense.optimizer.step, "host": host.truncate_weights}
    if itop:
        candidates["itop"] = with_gradients(subject).itop(itop, growth).truncate_weights
    rows = interleaved(candidates, repeats, subject.device)
    names = {"update_over_optimizer": ("host", "optimizer"), "itop_over_optimizer": ("itop", "optimizer")}
    return report(rows, names)
