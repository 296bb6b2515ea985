"""What became of runs' topologies, and what passes through their networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..training import runs
from ..training.images import sample
from .signals import gradient_norms, positive_preactivations
from .similarity import jaccard


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
