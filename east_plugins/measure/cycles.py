"""What became of a program's stages: accuracy, signs, connectivity and curvature of their ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..ops import figures, files
from ..ops import text as tables
from ..ops.doing import doing
from ..training import runs
from ..training.images import Data, sample
from . import landscape

POINTS = 11  #: networks on a line between two ends


def measure(folders: Sequence[Path], images: int = 1000, data: Data | None = None) -> list[dict[str, Any]]:
    """One row a stage, in order: of its last epoch's network.

    `flipped` of `common` active weights changed their sign since the stage before; `train_line` and `test_line` are the
    losses between the two ends on `images` training and test images (`landscape.line`), `train_barrier` and
    `test_barrier` how far they rise; all None for the first stage. `eigenvalue` is of the training images' loss.
    """
    rows: list[dict[str, Any]] = []
    before: runs.Run | None = None
    for folder in folders:
        doing(f"signs, curvature and the line between ends: {folder.name}")
        run = runs.load_run(folder, last=True)
        data = data or runs.load_data(run.config)
        train, test = sample(data.train, images), sample(data.test, images)
        last = runs.read_metrics(folder)[-1]
        row: dict[str, Any] = {
            "stage": folder.name,
            "density": run.summary["nonzeros"] / run.summary["maskable"],
            "nonzeros": run.summary["nonzeros"],
            "epochs": run.summary["epochs"],
            "train_loss": last["loss"],
            "test_accuracy": run.summary["test_accuracy"],
            "last_test_loss": landscape.mean_loss(run.model, test),
            "eigenvalue": landscape.largest_eigenvalue(run.model, run.masks, list(train.batches(500))),
            "flipped": None, "common": None, "train_barrier": None, "test_barrier": None,
            "train_line": None, "test_line": None,
        }  # fmt: skip
        if before is not None:
            ends = before.model.state_dict(), run.model.state_dict()
            row["flipped"], row["common"] = landscape.sign_flips(*ends, (before.masks, run.masks))
            lines = landscape.line(run.model, ends, (train, test), train, POINTS)
            for part, losses in zip(("train", "test"), lines, strict=True):
                row[f"{part}_line"], row[f"{part}_barrier"] = losses, landscape.barrier(losses)
        rows.append(row)
        before = run
    return rows


def write(out: Path, rows: Sequence[dict[str, Any]], title: str) -> str:
    """`cycles.csv`, `line.csv`, `table.md` and `cycles.png` in `out`; returns the table."""
    names = [name for name in rows[0] if not name.endswith("_line")]
    files.write_atomically(out / "cycles.csv", _csv([names, *([row[name] for name in names] for row in rows)]))
    places = [i / (POINTS - 1) for i in range(POINTS)]
    lines = [[f"{a['stage']} to {b['stage']}", part, place, loss]
             for a, b in zip(rows, rows[1:], strict=False) for part in ("train", "test")
             for place, loss in zip(places, b[f"{part}_line"], strict=True)]  # fmt: skip
    files.write_atomically(out / "line.csv", _csv([["between", "images", "place", "loss"], *lines]))
    table = markdown(rows)
    files.write_atomically(out / "table.md", table)
    picture(rows, out / "cycles.png", title)
    return table


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([["" if value is None else value for value in line] for line in lines])
    return text.getvalue()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a stage."""
    head = ["stage", "density", "active", "test accuracy", "signs flipped", "barrier, training", "barrier, test",
            "largest eigenvalue"]  # fmt: skip
    lines = []
    for row in rows:
        flips = "" if row["flipped"] is None else f"{row['flipped']:,} of {row['common']:,}"
        shown = [row["stage"], f"{100 * row['density']:.4g} %", f"{row['nonzeros']:,}"]
        rises = ["" if rise is None else f"{rise:.3f}" for rise in (row["train_barrier"], row["test_barrier"])]
        lines.append([*shown, f"{100 * row['test_accuracy']:.1f} %", flips, *rises, f"{row['eigenvalue']:.3g}"])
    return tables.markdown(head, lines)


def picture(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy and curvature by stage, and the loss between the ends of consecutive stages."""
    figure = figures.figure(10.5, 3.6)
    left, middle, right = figure.subplots(1, 3)
    numbers = list(range(1, len(rows) + 1))
    left.plot(numbers, [100 * row["test_accuracy"] for row in rows], **figures.drawn(0))
    left.set(xlabel="stage", ylabel="test accuracy (%)", title=title)
    for row, x in zip(rows, numbers, strict=True):
        label = f"{100 * row['density']:.3g} %"
        left.annotate(label, (x, 100 * row["test_accuracy"]), (0, 6), textcoords="offset points", fontsize=8)
    left.margins(0.12, 0.2)
    middle.plot(numbers, [row["eigenvalue"] for row in rows], **figures.drawn(3))
    middle.set(xlabel="stage", ylabel="largest eigenvalue of the Hessian")
    for axes in (left, middle):
        axes.set_xticks(numbers)
    for i, row in enumerate(rows[1:]):
        places = [k / (POINTS - 1) for k in range(POINTS)]
        style = {**figures.drawn(i), "markersize": 3}
        right.plot(places, row["train_line"], label=f"{i + 1} to {i + 2}", **style)
        right.plot(places, row["test_line"], **{**style, "linestyle": "--"})
    right.set(xlabel="between the ends of two stages", ylabel="loss: training -, test - -")
    if len(rows) > 1:
        right.legend(frameon=False, title="stages", fontsize=8)
    figures.save(figure, path, "`out`")
