"""How far the runs of a comparison are, by what stands in their folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence

from . import runs
from .jobs import Job
from .progress import SILENCE, duration

SHOWN = 4  #: runs in a line


class Watch(threading.Thread):
    """Says every 15 seconds how far the runs of a comparison are, and about how long all of them take."""

    def __init__(self, todo: Sequence[Job], say: Callable[[str], None], workers: int = 1):
        super().__init__(daemon=True)
        self.todo, self.say, self.workers = todo, say, workers
        self.over = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    def run(self) -> None:
        while not self.over.wait(SILENCE):
            if any(not (job.out / runs.SUMMARY).exists() for job in self.todo):
                self.say(self.state())

    def state(self) -> str:
        """The runs that have begun and are not finished, and the time that is left in all."""
        done = {job.out: _done(job) for job in self.todo}
        going = [
            f"{job.out.name} epoch {min(done[job.out][0] + 1, job.options.epochs)}/{job.options.epochs}"
            for job in self.todo
            if (job.out / runs.CONFIG).exists() and not (job.out / runs.SUMMARY).exists()
        ]
        more = [f"and {len(going) - SHOWN} more"] * (len(going) > SHOWN)
        finished = sum((job.out / runs.SUMMARY).exists() for job in self.todo)
        seconds = self._left(done)
        return ", ".join([*going[:SHOWN], *more] or ["starting"]) + (
            f"; {finished} of {len(self.todo)} finished, about {duration(seconds)} left in all" if seconds else ""
        )

    def _left(self, done: dict) -> float | None:
        """Seconds that are left, by what an epoch of the same method, network and data takes, else by the mean of all;
        None before the first one."""
        paces: dict[object, list[float]] = {}
        for job in self.todo:
            epochs, seconds = done[job.out]
            if epochs:
                for kind in (_kind(job), None):
                    paces.setdefault(kind, []).append(seconds / epochs)
        if not paces:
            return None
        mean = {kind: sum(values) / len(values) for kind, values in paces.items()}
        left = [
            mean.get(_kind(job), mean[None]) * max(0, job.options.epochs - done[job.out][0])
            for job in self.todo
            if not (job.out / runs.SUMMARY).exists()
        ]
        return max([sum(left) / self.workers, *left])  # the longest one is not shared out


def _kind(job: Job) -> tuple[object, ...]:
    """Runs alike in it take about as long."""
    return job.method, job.options.model, job.options.data, job.options.image_size


def _done(job: Job) -> tuple[int, float]:
    """Epochs that a run has behind it, and the seconds that they took."""
    try:
        lines = (job.out / runs.METRICS).read_bytes().splitlines()
        return len(lines), float(json.loads(lines[-1])["seconds"])
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return 0, 0.0
