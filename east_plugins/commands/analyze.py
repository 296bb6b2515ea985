"""The command `analyze`: what became of runs' topologies, and what passes through their networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..ops import text
from .parsing import add_trust, parser


def main(argv: Sequence[str]) -> int:
    parse = parser(
        "analyze",
        "Density, effective density, ITOP rate, gradient flow and positive pre-activations of runs' networks, the "
        "Jaccard similarity of their masks, and a verdict in words. Runs may be finished, running or interrupted. "
        "Nothing is written but the picture of --plot.",
        "analyze runs/a runs/comparison",
        "analyze runs/a --layers --images 512",
    )
    parse.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a comparison, "
                       "or a file of --east-state")  # fmt: skip
    parse.add_argument("--network", metavar="MODULE:FUNCTION", help="makes the network of the files of --east-state")
    parse.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: each run's)")
    parse.add_argument("--images", type=int, default=256, metavar="N", help="test images to measure with, "
                       "drawn at random, the same for all runs (default: 256)")  # fmt: skip
    parse.add_argument("--layers", action="store_true", help="a table of layers for each run, too")
    parse.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    parse.add_argument("--plot", type=Path, metavar="FILE", help="picture of accuracy against sparsity, of positive "
                       "inputs, gradient flow, ITOP rate and collapsed layers over time, such as a.png")  # fmt: skip
    add_trust(parse)
    args = parse.parse_args(argv)
    if args.images < 2:
        raise UsageError(f"--images must be at least 2, got {args.images}")
    from ..measure.analysis import analyze
    from ..measure.plots import plot
    from ..ops import figures

    if args.plot is not None:
        figures.check_path(args.plot, "--plot")
    report = analyze(args.runs, args.images, args.data_dir, args.network)
    if args.plot is not None:
        plot(report, args.runs, args.plot)
    print(json.dumps(report) if args.json else as_text(report, args.layers))
    return 0


def as_text(report: dict[str, Any], layers: bool = False) -> str:
    """The same for people."""
    head = ("density", "effective", "ITOP rate", "grad flow", "positive", "epoch", "validation", "test", "run")
    rows = [
        (
            *(_number(run[name], ".6f") for name in ("density", "effective_density", "itop_rate")),
            _number(run["gradient_flow"], ".3g"), _number(run["positive_preactivations"], ".1%"),
            f"{run['epoch']}/{run['epochs']}" if run["epochs"] else "", _number(run["validation_accuracy"], ".1%"),
            _number(run["test_accuracy"], ".1%"), run["run"],
        )
        for run in report["runs"]
    ]  # fmt: skip
    lines = [text.table(head, rows, ">>>>>>>><"), ""]
    lines += [f"{run['run']}: {run['verdict']}" for run in report["runs"]]
    if len(report["runs"]) > 1:
        lines += ["", "Jaccard similarity of masks, in the same order"]
        lines += [" ".join("     -" if v is None else f"{v:>6.3f}" for v in row) for row in report["jaccard"]]
    for run in report["runs"] if layers else ():
        cells = [
            (
                layer["name"],
                f"{layer['weights']:,}",
                f"{layer['active']:,}",
                _number(layer["on_path"], ","),
                _number(layer["gradient_norm"], ".3g"),
            )
            for layer in run["layers"]
        ]
        lines += [
            "",
            run["run"],
            text.table(("layer", "weights", "active", "on a path", "gradient norm"), cells, "<>>>>"),
        ]
        if run["relus"]:
            lines.append("positive inputs of each ReLU: " + " ".join(f"{share:.0%}" for share in run["relus"]))
    return "\n".join(lines)


def _number(value: float | None, kind: str) -> str:
    return "" if value is None else f"{value:{kind}}"
