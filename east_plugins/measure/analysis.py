"""What became of runs' topologies, and what passes through their networks."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..ops.doing import doing
from ..ops.maskable import theoretical_size
from ..ops.paths import on_path
from ..ops.signals import gradient_norms, positive_preactivations
from ..options.config import Config
from ..training import runs
from ..training.images import Data, sample
from ..training.verdict import verdict
from ..upstream import state
from .similarity import jaccard


@dataclass
class Network:
    """A run's network as it was tested, or, unfinished, as it was saved last; without masks where it was not yet."""

    folder: Path
    options: Config
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    model: nn.Module | None = None
    masks: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def analyze(
    folders: Sequence[Path], images: int = 256, data_dir: str | None = None, network: str | None = None
) -> dict[str, Any]:
    """One entry a run, and the similarity of every pair of masks of one network (None for others).

    A folder is that of a run, finished, running or interrupted, or of a comparison, which stands for all of its runs.
    Gradients are of the cross-entropy over `images` test images, drawn at random but the same for all runs, with batch
    statistics; pre-activations are those in evaluation. Nothing is written. A file of `run --east-state` is told by its
    masks, and where `network`, a `module:function`, makes its network, by its paths; what data would tell is None.
    Raises `UsageError` for other folders and files.
    """
    datasets: dict[tuple[Any, ...], Data] = {}
    loaded: list[dict[str, Tensor]] = []
    measured = []
    for folder in run_folders(folders):
        doing(f"analyzing {folder}")
        if folder.is_file():
            entry, masks = _of_script(folder, network)
            loaded.append(masks)
            measured.append(entry)
            continue
        options = dataclasses.replace(runs.read_config(folder), device="cpu")
        options = dataclasses.replace(options, data_dir=data_dir) if data_dir else options
        key = options.data, options.data_dir, options.image_size, options.limit, options.validation, options.seed
        if key not in datasets:
            datasets[key] = runs.load_data(options)
        run = _load(folder, options, datasets[key])
        loaded.append(run.masks)
        measured.append(_measure(run, *next(sample(datasets[key].test, images).batches(images))))
    return {
        "images": images,
        "runs": measured,
        "jaccard": [[_similarity(a, b) for b in loaded] for a in loaded],
    }


def run_folders(folders: Sequence[Path]) -> Iterator[Path]:
    """Every run's folder once, those of comparisons in order of their names."""
    seen = set()
    for folder in folders:
        inside = (
            [] if (folder / runs.CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{runs.CONFIG}"))
        )
        for found in inside or [folder]:
            if found.resolve() not in seen:
                seen.add(found.resolve())
                yield found


def _load(folder: Path, options: Config, data: Data) -> Network:
    network = Network(folder, options, runs.read_summary(folder), runs.read_metrics(folder))
    if network.summary is not None:
        run = runs.load_run(folder)
        network.model, network.masks = run.model, run.masks
    elif (folder / runs.CHECKPOINT).is_file():
        network.model, network.masks, epochs = _interrupted(folder, data)
        network.metrics = network.metrics[:epochs]  # a run can be some epochs past its last checkpoint
    return network


def _interrupted(folder: Path, data: Data) -> tuple[nn.Module, dict[str, Tensor], int]:
    """Network, masks and epochs of the last checkpoint, taken up in a copy: a run may be going on there."""
    from ..training.trainer import Trainer

    with tempfile.TemporaryDirectory() as copy:
        for name in (runs.CHECKPOINT, runs.CONFIG):
            shutil.copyfile(folder / name, Path(copy, name))
        trainer = Trainer(dataclasses.replace(runs.read_config(folder), device="cpu"), Path(copy), data)
        trainer.restore()
    trainer.engine.remove()
    return trainer.model.eval(), {name: mask.clone() for name, mask in trainer.host.masks.items()}, trainer.epoch


def _measure(network: Network, x: Tensor, y: Tensor) -> dict[str, Any]:
    summary, last = network.summary or {}, (network.metrics or [{}])[-1]
    entry: dict[str, Any] = {
        "run": str(network.folder),
        "method": network.options.method,
        "finished": network.summary is not None,
        "epoch": last.get("epoch", 0),
        "epochs": network.options.epochs,
        "validation_accuracy": summary.get("best_validation_accuracy", last.get("validation_accuracy")),
        "test_accuracy": summary.get("test_accuracy"),
        "itop_rate": summary.get("itop_rate", last.get("itop_rate")),
        **{name: last.get(name) for name in ("density", "nonzeros", "effective_density")},
        "gradient_flow": None, "positive_preactivations": None, "layers": [], "relus": [],
    }  # fmt: skip
    if network.model is not None:
        entry |= _signals(network.model, network.masks, x, y)
    return {**entry, "verdict": verdict(entry, network.metrics, summary.get("classes"))}


def _of_script(path: Path, network: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry of a file of `--east-state`, and its masks."""
    saved = state.read(path)
    masks, live = saved.masks, saved.masks
    size, known = sum(mask.numel() for mask in masks.values()), network is not None and saved.input_shape is not None
    if network is not None and saved.input_shape is not None:
        model = saved.network(state.build(network))
        live, size = on_path(model, masks, saved.input_shape), theoretical_size(model)
    layers: list[dict[str, Any]] = [
        {
            "name": name, "active": int(mask.sum()), "on_path": int(live[name].sum()) if known else None,
            "weights": mask.numel(), "gradient_norm": None,
        }
        for name, mask in masks.items()
    ]  # fmt: skip
    nonzeros = sum(layer["active"] for layer in layers)
    entry: dict[str, Any] = {
        **dict.fromkeys(("epoch", "epochs", "validation_accuracy", "test_accuracy", "gradient_flow")),
        "run": str(path), "method": saved.network_class, "finished": saved.finished, "steps": saved.steps,
        "density": nonzeros / size, "nonzeros": nonzeros,
        "effective_density": sum(layer["on_path"] for layer in layers) / size if known else None,
        "itop_rate": sum(int(fired.sum()) for fired in saved.fired_masks.values()) / size,
        "positive_preactivations": None, "layers": layers, "relus": [],
    }  # fmt: skip
    told = "name what makes the network with --network to see its paths"
    return {**entry, "verdict": verdict(entry, []) if known else told}, masks


def _signals(model: nn.Module, masks: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Any]:
    norms, shares = gradient_norms(model, masks, x, y), positive_preactivations(model, x)
    live, size = on_path(model, masks, x.shape[1:]), theoretical_size(model)
    layers: list[dict[str, Any]] = [
        {
            "name": name, "active": int(mask.sum()), "on_path": int(live[name].sum()), "weights": mask.numel(),
            "gradient_norm": norms[name],
        }
        for name, mask in masks.items()
    ]  # fmt: skip
    nonzeros = sum(layer["active"] for layer in layers)
    return {
        "density": nonzeros / size,
        "nonzeros": nonzeros,
        "effective_density": sum(layer["on_path"] for layer in layers) / size,
        "gradient_flow": sum(norms.values()),
        "positive_preactivations": sum(shares) / len(shares) if shares else None,
        "layers": layers,
        "relus": shares,
    }


def _similarity(a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    try:
        return jaccard(a, b) if a and b else None
    except UsageError:
        return None
