"""The runs of a comparison in processes of this machine: side by side on one device, or spread over its GPUs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from ..errors import Interrupted, InUseError
from ..options.config import Config
from .images import Kept
from .jobs import Job
from .trainer import train

logger = logging.getLogger(__name__)

GRACE = 30.0  #: seconds that a run has for saving where its parent has died

#: A run, and its summary, or what it failed of.
Outcome = tuple[Job, dict[str, Any] | Exception]


def run(todo: Sequence[Job], workers: int = 1) -> Iterator[Outcome]:
    """Train every job, `workers` at a time. A run whose process dies is tried once more."""
    if workers == 1 or len(todo) < 2:
        kept: Kept = {}  # reading the files can take longer than a short run
        for job in todo:
            yield job, result(functools.partial(train_job, job.options, job.out, kept))
        return
    waiting, died = deque(todo), list[Job]()
    while waiting:
        for job, outcome in _side_by_side(waiting, workers):
            if isinstance(outcome, BrokenProcessPool):
                died.append(job)
            else:
                yield job, outcome
    for job in died:  # by itself: a process that dies takes those beside it along
        yield from _side_by_side(deque([job]), 1)


def devices(options: Config, count: int) -> list[str | None]:
    """The devices that runs with these options may be on, of a machine with `count` CUDA devices: all of them where the
    options name none of them."""
    if options.device in (None, "cuda") and count > 1:
        return [f"cuda:{i}" for i in range(count)]
    return [options.device]


def least_busy(names: Sequence[str | None], running: Sequence[str | None]) -> str | None:
    """The device of `names` that the fewest of the `running` jobs are on, the first one of several."""
    busy = Counter(running)
    return min(names, key=lambda name: busy[name])


def train_job(options: Config, out: Path, kept: Kept | None = None) -> dict[str, Any]:
    """Train one job, or go on with it; wait where a run that lost its parent still saves in its folder. `kept` as of
    `train`."""
    ends = time.monotonic() + GRACE + 5
    while True:
        try:
            return train(options, out, resume=True, quiet=True, kept=kept)
        except InUseError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)


def _side_by_side(waiting: deque[Job], workers: int) -> Iterator[Outcome]:
    """Train `waiting` in processes, until none is left or one of the processes has died."""
    spawn = multiprocessing.get_context("spawn")
    running: dict[Future[dict[str, Any]], tuple[Job, str | None]] = {}
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        while running or waiting:
            while waiting and len(running) < workers:  # one more, and the pool would start it after Ctrl-C
                job = waiting[0]
                names = devices(job.options, torch.cuda.device_count())
                device = least_busy(names, [place for _, place in running.values()])
                try:
                    future = pool.submit(train_job, dataclasses.replace(job.options, device=device), job.out)
                except BrokenProcessPool:
                    break
                running[future] = job, device
                waiting.popleft()
            if not running:  # the pool is broken
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future)[0], result(future.result)


def result(of: Callable[[], dict[str, Any]]) -> dict[str, Any] | Exception:
    """What a run gives, or what it fails of; Ctrl-C is no failure."""
    try:
        return of()
    except Interrupted:
        raise
    except Exception as error:  # whatever a run, or a plugin of somebody else's in it, raises
        logger.debug("a run failed", exc_info=error)
        return error


def _end_with_parent() -> None:
    """In a worker: where the process that started it dies, save and end, as on Ctrl-C."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for_end, args=(parent.sentinel,), daemon=True).start()


def _wait_for_end(sentinel: int) -> None:
    connection.wait([sentinel])
    signal.raise_signal(signal.SIGINT)  # taken by the main thread
    time.sleep(GRACE)
    os._exit(130)
