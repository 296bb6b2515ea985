"""Where the figures of every epoch go beside `metrics.jsonl`: TensorBoard, a CSV file, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import importlib
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import EastError, MissingExtraError
from ..ops.files import write_atomically
from ..options.config import Resolved

logger = logging.getLogger(__name__)

PROJECT = "east_plugins"  #: of Weights & Biases and MLflow, where their own variables name no other


class Logger(Protocol):
    """Gets the numbers of every epoch, and in the end those of the whole run."""

    def epoch(self, values: Mapping[str, float], epoch: int) -> None: ...
    def summary(self, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


#: Name to what must be installed.
MODULES = {
    "tensorboard": "torch.utils.tensorboard", "csv": "csv", "wandb": "wandb", "mlflow": "mlflow",
}  # fmt: skip


def check(names: Sequence[str] | None) -> None:
    """Raises `MissingExtraError` where a logger that is named is not installed."""
    for name in names or ():
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise MissingExtraError(f"`loggers` {name}: pip install {name}") from error


class Loggers:
    """All loggers of a run; one that fails on the way is left out from there on, with a warning.

    `options.loggers` None: TensorBoard where it is installed. Raises `EastError` where a logger that is named cannot
    begin. `done` epochs are behind the run.
    """

    def __init__(self, options: Resolved, out: Path, done: int):
        self.active: dict[str, Logger] = {}
        for name in ["tensorboard"] if options.loggers is None else options.loggers:
            try:
                self.active[name] = _KINDS[name](options, out, done)
            except ImportError:
                continue  # checked before, where it is named
            except Exception as error:  # theirs are of many kinds
                self.close()
                raise EastError(f"`loggers` {name}: {' '.join(str(error).split())[:200]}") from error

    def epoch(self, line: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`."""
        self._each(lambda one: one.epoch(_numbers(line), line["epoch"]))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda one: one.summary(_numbers(values)))

    def close(self) -> None:
        self._each(lambda one: one.close())
        self.active = {}

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, one in list(self.active.items()):
            try:
                call(one)
            except Exception as error:  # a server that is away must not end a run
                logger.warning("logger %s is left out from here on: %s", name, " ".join(str(error).split())[:200])
                del self.active[name]


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line is a number; NaN for None, which stands for it in JSON."""
    kinds = (int, float, type(None))
    return {name: math.nan if value is None else value for name, value in line.items() if isinstance(value, kinds)}


class TensorBoard:
    """Event files in the run's folder; scalars from here on stand in place of those that a killed run has left."""

    def __init__(self, options: Resolved, out: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out, purge_step=done + 1)

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def summary(self, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


class Csv:
    """`metrics.csv` in the run's folder, a line an epoch."""

    def __init__(self, options: Resolved, out: Path, done: int):
        self.path = out / "metrics.csv"
        lines = self.path.read_text().splitlines()[: done + 1] if self.path.exists() and done else []
        write_atomically(self.path, "".join(f"{line}\n" for line in lines))
        self.head = bool(lines)

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(values), lineterminator="\n")
            if not self.head:
                writer.writeheader()
            writer.writerow(values)
        self.head = True

    def summary(self, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class WandB:
    """A run of Weights & Biases, in the project of WANDB_PROJECT; going on with a run goes on with its."""

    def __init__(self, options: Resolved, out: Path, done: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=out.name, dir=out, config=options.as_dict(),
            id=_identity(out, done), resume="allow", settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(values), step=epoch)

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, in the experiment of MLFLOW_EXPERIMENT_NAME; going on with a run
    goes on with its."""

    def __init__(self, options: Resolved, out: Path, done: int):
        import mlflow

        self.client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        tag = _identity(out, done)
        before = self.client.search_runs([experiment], f"tags.east_plugins = '{tag}'", max_results=1) if done else []
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self.client.create_run(experiment, run_name=out.name, tags={"east_plugins": tag}).info.run_id
            for key, value in options.as_dict().items():
                self.client.log_param(self.id, key, value)

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, float(value), step=epoch)

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, f"final_{name}", float(value))

    def close(self) -> None:
        self.client.set_terminated(self.id)


_KINDS: dict[str, Callable[[Resolved, Path, int], Logger]] = {
    "tensorboard": TensorBoard, "csv": Csv, "wandb": WandB, "mlflow": MLflow,
}  # fmt: skip


def _identity(out: Path, done: int) -> str:
    """A name for the run in this folder, kept in it: the same when it goes on, another one when it begins anew."""
    path = out / "logger-id"
    if not (done and path.exists()):
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text().strip()
