"""The runs of a comparison on a Ray cluster: the one that RAY_ADDRESS names, or one that is started on this machine."""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import EastError, Interrupted, MissingExtraError
from .jobs import Job
from .pool import Outcome, train_job


def check() -> None:
    """Raises `MissingExtraError` where Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("`backend` ray needs Ray: pip install 'east_plugins[ray]'") from error


def run(todo: Sequence[Job], workers: int | None = None) -> Iterator[Outcome]:
    """Train every job as a task of the cluster, `workers` at a time (None: as many as it has room for). A run whose
    machine or process is lost is tried once more.

    A run takes as many CPUs as its `threads` and, where the cluster has GPUs and the run may be on one, a GPU. Its
    folder must be one that all machines have.
    """
    import ray

    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without GPUs leaves them as they are
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(max_retries=1)(_train)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    waiting, running = deque(todo), dict[Any, Job]()
    try:
        while running or waiting:
            while waiting and len(running) < (workers or len(todo)):
                job = waiting.popleft()
                on_gpu = gpus > 0 and (job.options.device or "cuda").startswith("cuda")
                asked = task.options(num_cpus=job.options.threads or 1, num_gpus=int(on_gpu), name=job.out.name)
                running[asked.remote(job)] = job
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield running.pop(reference), _outcome(functools.partial(ray.get, reference))
    finally:
        for reference in running:  # Ctrl-C: they save and end
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=30)
        if mine:
            ray.shutdown()


def _train(job: Job) -> dict[str, Any] | str:
    """The summary of a run, or what it failed of, in words: exceptions of somebody else's may not travel."""
    try:
        return train_job(job.options, job.out.absolute())
    except Interrupted:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _outcome(get: Any) -> dict[str, Any] | Exception:
    from ray.exceptions import RayError

    try:
        found = get()
    except RayError as error:
        return EastError(" ".join(str(error).split())[:200])
    return EastError(found) if isinstance(found, str) else found
