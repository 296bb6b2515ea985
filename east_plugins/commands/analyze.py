"""The command `analyze`: what became of finished runs' topologies, and what passes through their networks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..measure.signals import gradient_norms, positive_preactivations
from ..measure.similarity import jaccard
from ..options import flags
from ..training import runs
from ..training.images import sample


def main(argv: Sequence[str]) -> int:
    parser = flags.Parser(
        prog="east_plugins analyze",
        description="Density, effective density, ITOP rate, gradient flow and positive pre-activations of finished "
        "runs' networks, and the Jaccard similarity of their masks. Nothing is written.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: each run's)")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="test images to measure with, "
                        "drawn at random, the same for all runs (default: 256)")  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="a table of layers for each run, too")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    args = parser.parse_args(argv)
    if args.images < 2:
        raise UsageError(f"--images must be at least 2, got {args.images}")
    report = analyze(args.runs, args.images, args.data_dir)
    print(json.dumps(report) if args.json else as_text(report, args.layers))
    return 0


def analyze(folders: Sequence[Path], images: int = 256, data_dir: str | None = None) -> dict[str, Any]:
    """One entry a run, and the similarity of every pair of masks of one network (None for others).

    Gradients are of the cross-entropy over `images` test images, drawn at random but the same for all runs, with batch
    statistics; pre-activations are those in evaluation. Raises `UsageError` for a folder without a finished run.
    """
    loaded = [runs.load_run(folder) for folder in folders]
    batches: dict[tuple, tuple[Tensor, Tensor]] = {}
    measured = []
    for run in loaded:
        options = dataclasses.replace(run.config, data_dir=data_dir) if data_dir else run.config
        source = options.data, options.data_dir, options.image_size
        if source not in batches:
            batches[source] = next(sample(runs.load_data(options).test, images).batches(images))
        measured.append(_measure(run, *batches[source]))
    return {
        "images": images,
        "runs": measured,
        "jaccard": [[_similarity(a, b) for b in loaded] for a in loaded],
    }


def _measure(run: runs.Run, x: Tensor, y: Tensor) -> dict[str, Any]:
    norms, shares = gradient_norms(run.model, run.masks, x, y), positive_preactivations(run.model, x)
    kept = ("method", "density", "nonzeros", "effective_density", "itop_rate", "test_accuracy")
    return {
        "run": str(run.folder),
        **{name: run.summary[name] for name in kept},
        "gradient_flow": sum(norms.values()),
        "positive_preactivations": sum(shares) / len(shares) if shares else None,
        "layers": [
            {"name": name, "active": int(mask.sum()), "weights": mask.numel(), "gradient_norm": norms[name]}
            for name, mask in run.masks.items()
        ],
        "relus": shares,
    }


def _similarity(a: runs.Run, b: runs.Run) -> float | None:
    try:
        return jaccard(a.masks, b.masks)
    except UsageError:
        return None


def as_text(report: dict[str, Any], layers: bool = False) -> str:
    """The same for people."""
    lines = [f"{'density':>9} {'effective':>9} {'ITOP rate':>9} {'grad flow':>9} {'positive':>8} {'test':>6}   run"]
    for run in report["runs"]:
        positive = "" if run["positive_preactivations"] is None else f"{run['positive_preactivations']:.1%}"
        lines.append(
            f"{run['density']:>9.6f} {run['effective_density']:>9.6f} {run['itop_rate']:>9.6f} "
            f"{run['gradient_flow']:>9.3g} {positive:>8} {run['test_accuracy']:>6.1%}   {run['run']}"
        )
    if len(report["runs"]) > 1:
        lines += ["", "Jaccard similarity of masks, in the same order"]
        lines += [" ".join("     -" if v is None else f"{v:>6.3f}" for v in row) for row in report["jaccard"]]
    for run in report["runs"] if layers else ():
        lines += ["", f"{run['run']}", f"{'layer':<32} {'weights':>10} {'active':>9} {'gradient norm':>14}"]
        lines += [
            f"{layer['name']:<32} {layer['weights']:>10,} {layer['active']:>9,} {layer['gradient_norm']:>14.3g}"
            for layer in run["layers"]
        ]
        lines.append("positive inputs of each ReLU: " + " ".join(f"{share:.0%}" for share in run["relus"]))
    return "\n".join(lines)
