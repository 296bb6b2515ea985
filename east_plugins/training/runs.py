"""Run directories: what a training run leaves on disk, written so that a crash never leaves half a file."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import UsageError
from ..host import presets
from ..ops import files
from ..ops.checkpoints import CHECKPOINT
from ..ops.checkpoints import load as load_checkpoint
from ..ops.doing import doing
from ..ops.files import check_folder, digest, make_folder, write_atomically  # noqa: F401
from ..ops.maskable import layers
from ..ops.packing import pack
from ..options import sources
from ..options.config import Config, Resolved
from ..plugins import registry
from ..plugins.transform.quiet import silence
from . import classes, images, models

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
DATA = "data.json"  #: what inputs and outputs of the network are
PREVIOUS = "checkpoint.previous.pt"  #: the checkpoint before the last one


def weights_of(epoch: int) -> str:
    """File of the weights as they were at the end of an epoch, which `keep_weights` names."""
    return f"weights-{epoch}.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, complete or not at all; what is mostly zero takes its active values' space. The one before it
    is kept."""
    files.save_checkpoint(path, pack(state), path.with_name(PREVIOUS))


def write_config(folder: Path, options: Resolved) -> None:
    """`config.yaml`: resolved options, readable by `--config`, and the versions that ran them. Where a run was told to
    stop early is left out: going on with it is not."""
    import yaml

    options = dataclasses.replace(options, limit_steps=None)

    versions = {
        "east_plugins": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / CONFIG, yaml.safe_dump({**options.as_dict(), "versions": versions}, sort_keys=False))


def write_data(folder: Path, options: Config, data: images.Data) -> None:
    """`data.json`: what the network's outputs are called and how its inputs are made, from values of 0 to 255."""
    parts = {
        name: len(part) for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    mean, std = (
        [round(value, 6) for value in tensor.flatten().tolist()] for tensor in (data.train.mean, data.train.std)
    )
    content = {
        "data": options.data,
        "input_shape": list(data.input_shape),
        "mean": mean,
        "std": std,
        "classes": classes.names(options.data, options.data_dir, data.num_classes),
        "images": parts,
    }
    write_atomically(folder / DATA, json.dumps(content, indent=1) + "\n")


def read_config(folder: Path) -> Config:
    """The options in a run's `config.yaml`; raises `UsageError` where there are none, or where they name a plugin as
    `module:attribute` that the user did not name himself (`registry.trust`)."""
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no run directory: it has no {CONFIG}")
    with registry.names_of_a_file():
        found = sources.from_flags({"config": folder / CONFIG})
    return dataclasses.replace(found, download=False)  # nothing is fetched on a file's word


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A finished run's `summary.json`, or None."""
    try:
        found = json.loads((folder / SUMMARY).read_text())
        known = {name: found[name] for name in ("steps", "epochs", "classes", "nonzeros")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if all(type(value) is int and value > 0 for value in known.values()) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, one an epoch."""
    path = folder / METRICS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def build_model(options: Resolved, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The network that the options describe, transforms applied, initial values drawn from `seed`.

    Raises `UsageError` for a combination that cannot be.
    """
    if options.dctps:
        _check_dctps(options)
    torch.manual_seed(options.seed)
    channels, _, size = input_shape
    model = models.build(options.model, num_classes, channels, size, options.width)
    if options.bias_free_head:
        *_, head = (layer for _, layer in layers(model))
        head.bias = None
    if options.transform:
        returned = registry.transform.bound(options.transform, options.options_of("transform"))(model)
        model = returned if isinstance(returned, nn.Module) else model  # some change the model and return a report
    if options.dctps:
        registry.transform.get("dctps")(model, engine=options.dctps_engine)
    if options.east.share:
        registry.transform.get("share")(model, options.east.share_from, scale=options.east.share_scale)
    silence(presets.quiet_branches(options, model, input_shape))
    return model


def _check_dctps(options: Resolved) -> None:
    if options.east.share:
        raise UsageError(
            "`dctps` `east_share`: weight sharing is left out with DCTpS, to prevent conflicts with the DCT matrices "
            "(EAST paper, Section 4)"
        )
    allocation = registry.allocation.entry(options.sparse_init)
    if allocation.meta.get("needs_weights"):
        raise UsageError(
            f"`dctps` `sparse_init` {allocation.name}: the sparse weights of DCTpS layers start at zero, so that "
            "their saliency says nothing; allowed are ERK, ER, uniform, EPL, EPF, connected"
        )
    if options.weight_init != "default":
        raise UsageError(f"`dctps` `weight_init` {options.weight_init}: sparse weights of DCTpS layers start at zero")


def device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one; raises `UsageError` where it cannot be used."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"`device` {name} cannot be used: {' '.join(str(error).split())[:120]}") from error
    return found


def load_data(options: Config, kept: images.Kept | None = None) -> images.Data:
    """A run's images; `kept` as of `images.load`."""
    doing(f"{'getting' if options.download else 'reading'} {options.data}")
    return images.load(
        options.data,
        options.data_dir,
        options.image_size,
        options.validation,
        options.seed,
        options.limit,
        options.download,
        split=options.decided("validation_split"),
        crop_padding=options.decided("crop_padding"),
        kept=kept,
    )


@dataclass
class Run:
    """A finished run: its network, that network's masks, and what is known of it."""

    folder: Path
    config: Resolved
    summary: dict[str, Any]
    model: nn.Module
    masks: dict[str, Tensor]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.summary["input_shape"])


def load_run(folder: str | Path, last: bool = False) -> Run:
    """The trained network of a run directory, in evaluation mode on the CPU: the one that was tested, or with `last`
    that of the last epoch.

    Raises `UsageError` where the folder is no run's, the run is unfinished, or a file is damaged.
    """
    folder = Path(folder)
    asked = read_config(folder)
    summary = read_summary(folder)
    if summary is None:
        raise UsageError(f"{folder} holds an unfinished run: it has no readable {SUMMARY}; go on with train `resume`")
    checkpoint = load_checkpoint(folder / CHECKPOINT)
    try:
        options = asked.resolve(summary["steps"] // summary["epochs"])
        best = checkpoint["best"]
        weights, masks = (checkpoint["model"], checkpoint["host"]["masks"]) if last else (best["model"], best["masks"])
        model = build_model(options, summary["classes"], tuple(summary["input_shape"]))
        model.load_state_dict(weights)
        return Run(folder, options, summary, model.eval(), masks)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{folder} is damaged: {SUMMARY}, {CHECKPOINT} and {CONFIG} do not fit ({reason})") from error


#: Settings that say where and how a run is computed, not what it is.
_ELSEWHERE = {
    "device",
    "threads",
    "download",
    "save_every",
    "on_nonfinite",
    "limit_steps",
    "loggers",
    "signals",
    "origins",
}


def difference(a: Resolved, b: Resolved) -> tuple[str, Any, Any] | None:
    """A setting in which two resolved configurations differ, with both values; None where they are the same run, on
    whatever device, with however many threads."""
    ours, theirs = ({**{f"east_{n}": v for n, v in vars(r.east).items()}, **vars(r)} for r in (a, b))
    names = ["epochs", *ours]  # of which others may follow
    for name in (name for name in names if name not in _ELSEWHERE | {"east"}):
        if ours[name] != theirs[name]:
            return name, ours[name], theirs[name]
    return None


def finished(options: Config, out: Path) -> dict[str, Any] | None:
    """The summary of the run in `out` where it has ended; raises `UsageError` where it is another run."""
    summary = read_summary(out)
    if summary is not None:
        check_same(out, options.resolve(summary["steps"] // summary["epochs"]))
    return summary


def check_same(out: Path, options: Resolved) -> None:
    """Raises `UsageError`, naming a setting and both values, where the run in `out` is not that of the resolved
    `options`."""
    there = read_config(out).resolve(options.steps_per_epoch)
    if found := difference(there, options):
        name, old, new = found
        raise UsageError(f"`out` {out} holds another run: `{name}` is {old} in its {CONFIG}, here it is {new}")
