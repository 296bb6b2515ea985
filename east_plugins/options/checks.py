"""What settings of a run cannot be, alone and together; each is one `UsageError`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import UnknownNameError, UsageError
from ..plugins.density import check_density
from . import methods, plugged
from .flags import check_size

if TYPE_CHECKING:
    from .config import Config

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")


def check(run: Config) -> None:
    """All of it."""
    _numbers(run)
    _names(run)
    _together(run)
    _method(run)


def _numbers(run: Config) -> None:
    """Ranges."""
    if run.density is not None:
        check_density(run.density)
    for name in ("epochs", "update_frequency", "limit", "limit_steps", "update_batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` must be at least 1, got {value}")
    for name in ("batch_size", "threads", "width", "image_size"):
        check_size(name, getattr(run, name))
    seeds = (-(2**63), 2**64 - 1)
    ranges = dict(lr=(0, 1e6), weight_decay=(0, 1e6), death_rate=(0, 1), seed=seeds, order_seed=seeds)
    for name, (low, high) in ranges.items():
        value = getattr(run, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"`{name}` must be in [{low}, {high}], got {value}")
    if not 0 <= run.momentum < 1:
        raise UsageError(f"`momentum` must be from 0 on and below 1, got {run.momentum}")
    for name in run.loggers or ():
        if name not in LOGGERS:
            raise UnknownNameError("`loggers`", name, LOGGERS)
    if run.device == "":
        raise UsageError("`device` is empty: allowed are cpu, cuda, cuda:1, ...")
    if not 0 <= run.warmup <= run.epochs:
        raise UsageError(f"`warmup` must be in [0, {run.epochs}] epochs, got {run.warmup}")
    if wrong := [epoch for epoch in run.keep_weights or () if not 0 <= epoch <= run.epochs]:
        raise UsageError(f"`keep_weights` must be epochs from 0 to {run.epochs}, got {wrong[0]}")
    for epoch in run.lr_drops or ():
        if not 0 <= epoch < math.inf:
            raise UsageError(f"`lr_drops` must be epochs from 0 on, got {epoch}")


def _names(run: Config) -> None:
    """Plugins that there are."""
    named = (
        "growth", "death", "redistribution", "structure", "sparse_init", "density_schedule", "decay_schedule",
        "companion",
    )  # fmt: skip
    for name in named:
        plugged.BY_SETTING[name].entry(getattr(run, name))
    if run.density_schedule == "cyclic":
        raise UsageError("`density_schedule` cyclic is `east_cyclic`, which has its numbers")


def _together(run: Config) -> None:
    """What needs something else, or does not go with it."""
    if run.recipe is not None and run.recipe not in methods.RECIPES:
        raise UnknownNameError("`recipe`", run.recipe, methods.RECIPES)
    if run.nesterov and not run.has_momentum:
        raise UsageError(
            f"`nesterov` needs `optimizer` sgd and `momentum` over 0, got {run.optimizer} and {run.momentum:g}"
        )
    if run.save_every is not None and not 0 <= run.save_every < math.inf:
        raise UsageError(f"`save_every` must be minutes from 0, got {run.save_every}")
    if run.clip_norm is not None and not 0 < run.clip_norm < math.inf:
        raise UsageError(f"`clip_norm` must be over 0, got {run.clip_norm}")
    if run.clip_norm_of is not None and run.decided("clip_norm") is None:
        raise UsageError("`clip_norm_of` needs `clip_norm`")
    if run.compile and run.engine == "sparse":
        raise UsageError("`compile` goes with `engine` dense: the sparse engine has compiled kernels of its own")
    if run.cuda_graph and run.engine == "sparse":
        raise UsageError("`cuda_graph` goes with `engine` dense: a graph holds the operations of one topology else")
    if run.cuda_graph and run.update_batch is not None:
        raise UsageError("`cuda_graph` holds one batch's passes: `update_batch` needs others")


def _method(run: Config) -> None:
    """What the method, and cycles, leave to be said."""
    preset, schedule = run.preset, run.chosen().get("density_schedule", "constant")
    cyclic = preset.settings.get("east_cyclic") if run.east.cyclic is None else run.east.cyclic
    if (preset.static or run.fix) and run.update_frequency is not None:
        still = "`fix`" if run.fix else f"`method` {run.method}"
        raise UsageError(f"{still} has no topology updates: `update_frequency` needs a run that has")
    if run.fix and (cyclic or schedule != "constant"):
        raise UsageError("`fix` keeps the topology: allowed is a constant density")
    if cyclic and schedule != "constant":
        raise UsageError(
            f"`method` {run.method}: `east_cyclic` and `density_schedule` {schedule} both set the density over "
            "time; allowed with cycles is constant"
        )
