"""The paper's headline on one GPU: extreme sparsities, the methods beside each other.

A part trains its runs, several side by side, for at most 9 minutes; called again, it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from ..ops.doing import doing
from ..options import flags, sources
from ..training import jobs as jobs_of
from ..training import runs
from ..training import table as table_of

LIMIT = 520  # seconds of a call
SAVING = 20  # seconds of it that stopped runs have for writing their state
SPARSITIES = (0.9995, 0.9999)
METHODS = {
    "paper": "rigl,set,rigl+dyrelu,rigl+share,east",
    "connected": "rigl+connected,east+connected",
    "dctps": "rigl+dctps,east+dctps",
}
PARTS = {f"{model}-{group}": (model, group) for model in ("resnet34", "resnet50") for group in METHODS}
DECODED = "cifar-10-batches-py"
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Wanted:
    """A part's runs: `tiny`, two small ones; `jobs` at a time; started until `seconds` have passed."""

    part: str
    out: Path
    tiny: bool = False
    epochs: int | None = None
    seeds: str = "0"
    jobs: int = 4
    seconds: float = LIMIT

    @property
    def data(self) -> Path:
        """The folder of the decoded images."""
        return self.out / "data"


def settings(wanted: Wanted) -> dict[str, Any]:
    """The flags of a part's runs that all of them have: Table B.1 scaled to the epochs; DCTpS: Tables C.2 to C.5."""
    model, group = PARTS[wanted.part]
    epochs = wanted.epochs or (4 if wanted.tiny else 12)
    cuda = torch.cuda.is_available()
    given: dict[str, Any] = {
        "model": model, "data": "cifar10", "data_dir": str(wanted.data),
        "epochs": epochs,
        "device": "cuda" if cuda else "cpu", "amp": True, "channels_last": True, "threads": 1, "batch_size": 128,
        "engine": "dense",  # runs that share a GPU would measure each other
    }  # fmt: skip
    if group == "dctps":  # the paper's optimizer for it, on the schedule that all have
        drops = [epochs * drop / 250 for drop in (75, 150)]
        given |= {"optimizer": "adam", "weight_decay": 5e-4, "lr_drops": drops}
    if wanted.tiny:
        given |= {"width": 8, "limit": 64, "batch_size": 16}
    return given


def jobs(wanted: Wanted) -> list[jobs_of.Job]:
    """The part's runs, checked."""
    _, group = PARTS[wanted.part]
    try:
        seeds = [int(seed) for seed in wanted.seeds.split(",")]
    except ValueError:
        raise UsageError(f"`seeds` must be whole numbers joined by commas, got {wanted.seeds!r}") from None
    sparsities = [0.9] if wanted.tiny else SPARSITIES
    found = jobs_of.jobs(METHODS[group].split(","), sparsities, seeds, wanted.out / wanted.part, settings(wanted))
    return found[:2] if wanted.tiny else found


# ---------------------------------------------------------------------- data, decoded once


def prepare(source: Path, folder: Path) -> None:
    """Class folders `train` and `test` of 32x32 images, as a tree or a tar archive of it, as CIFAR-10's own files of
    uint8 arrays in `folder`, where `--data cifar10` reads them."""
    if prepared(folder):
        return
    doing(f"decoding {source}")
    files: dict[str, dict[str, list[tuple[str, bytes]]]] = {"train": {}, "test": {}}
    for path, content in _files(source):
        place = path.split("/")
        if len(place) >= 3 and place[-3] in files and path.lower().endswith(IMAGES):
            files[place[-3]].setdefault(place[-2], []).append((path, content))
    classes = sorted(files["train"])
    if not classes or sorted(files["test"]) != classes:
        raise UsageError(f"`data` {source}: expected are train/<class>/ and test/<class>/ with the same classes")
    unfinished = folder / f".unfinished-{os.getpid()}"
    unfinished.mkdir(parents=True)
    for part, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        labelled = [(i, image) for i, name in enumerate(classes) for _, image in sorted(files[part][name])]
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(_decode, [image for _, image in labelled])))
        labels = np.array([label for label, _ in labelled])
        for name, index in zip(names, np.array_split(np.arange(len(labels)), len(names)), strict=True):
            batch = {"data": images[index].reshape(len(index), -1), "labels": labels[index].tolist()}
            (unfinished / name).write_bytes(pickle.dumps(batch, protocol=2))
    unfinished.rename(folder / DECODED)


def prepared(folder: Path) -> bool:
    """Whether `prepare` has been there."""
    return (folder / DECODED).is_dir()


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a folder or a tar archive."""
    if source.is_dir():
        for path in source.rglob("*"):
            if path.suffix.lower() in IMAGES:
                yield path.as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member)  # None for a folder
                if file:
                    yield member.name, file.read()
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"`data` {source} is neither a folder nor a readable tar archive: {error}") from error


def _decode(content: bytes) -> np.ndarray:
    """uint8 [3, 32, 32]."""
    from PIL import Image

    with Image.open(BytesIO(content)) as image:
        if image.size != (32, 32):
            raise UsageError(f"`data`: images must have 32x32 pixels, found {image.width}x{image.height}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


# ---------------------------------------------------------------------- running


def run(wanted: Wanted, began: float, note: Callable[[str], None]) -> bool:
    """Train what is unfinished, until done or `wanted.seconds` after `began`; True when all are done. `note` is given
    each run's last line."""
    ends = began + wanted.seconds - SAVING
    todo = [job for job in jobs(wanted) if runs.read_summary(job.out) is None]
    doing(f"{len(todo)} runs of {wanted.part}, {wanted.jobs} at a time")
    running: list[tuple[jobs_of.Job, subprocess.Popen]] = []
    try:
        while todo or running:
            while todo and len(running) < wanted.jobs and time.monotonic() < ends:
                job = todo.pop(0)
                running.append((job, _start(job)))
            for job, process in running:
                if process.poll() is not None:
                    note(_last_line(job, process.returncode))
            running = [(job, process) for job, process in running if process.returncode is None]
            if time.monotonic() >= ends:
                break
            time.sleep(0.2)
    finally:
        _stop(running, note)
    done, total = progress(wanted)
    return done == total


def progress(wanted: Wanted) -> tuple[int, int]:
    """How many of the part's runs are finished, and how many there are."""
    todo = jobs(wanted)
    return sum(runs.read_summary(job.out) is not None for job in todo), len(todo)


def _start(job: jobs_of.Job) -> subprocess.Popen:
    parser = flags.Parser(add_help=False)
    sources.add_flags(parser)
    arguments = flags.as_arguments(job.options.as_dict(), parser, str(job.out))
    command = [sys.executable, "-m", "east_plugins", "train", "--resume", "--quiet", "--out", str(job.out), *arguments]
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.out}.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _last_line(job: jobs_of.Job, code: int) -> str:
    log = Path(f"{job.out}.txt").read_text().splitlines()
    return f"{job.out.name}: {log[-1] if log else f'exit {code}'}"


def _stop(running: list[tuple[jobs_of.Job, subprocess.Popen]], note: Callable[[str], None]) -> None:
    """Have runs save themselves; what has not ended in time is killed and goes on from its last checkpoint."""
    for _, process in running:
        process.send_signal(signal.SIGINT)
    ends = time.monotonic() + SAVING
    for job, process in running:
        try:
            process.wait(max(0.1, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        note(_last_line(job, process.returncode))


# ---------------------------------------------------------------------- table


def table(out: Path) -> str:
    """Test accuracy of all finished runs of all parts, methods down, sparsities across, one table a network."""
    texts: list[str] = []
    everything: dict[str, dict[str, Any]] = {}
    for model in ("resnet34", "resnet50"):
        found: list[tuple[Path, dict[str, Any]]] = []
        for group in METHODS:
            folders = sorted(path for path in (out / f"{model}-{group}").glob("*-seed*") if path.is_dir())
            found += [(folder, summary) for folder in folders if (summary := runs.read_summary(folder))]
            unfinished = [folder.name for folder in folders if runs.read_summary(folder) is None]
            texts += [f"unfinished in {model}-{group}: {', '.join(unfinished)}\n"] * bool(unfinished)
        if not found:
            continue
        pairs = [(_job(folder), summary) for folder, summary in found]
        order = ",".join(METHODS.values()).split(",")
        pairs.sort(key=lambda pair: (order.index(pair[0].method), pair[0].sparsity, pair[0].seed))
        rows = table_of.collect(pairs)
        epochs = sorted({summary["epochs"] for _, summary in pairs})
        texts.append(f"{model}, {'/'.join(map(str, epochs))} epochs\n\n"
                     + table_of.markdown(rows))  # fmt: skip
        everything[model] = {job.out.name: summary for job, summary in pairs}
    if not everything:
        raise UsageError(f"`out` {out} holds no finished run; expected is the folder of the other parts")
    runs.write_atomically(out / "table.json", json.dumps(everything, indent=1) + "\n")
    text = "\n".join(texts)
    runs.write_atomically(out / "table.md", text)
    return text


def _job(folder: Path) -> jobs_of.Job:
    method, sparsity, seed = folder.name.rsplit("-", 2)
    return jobs_of.Job(method, float(sparsity), int(seed.removeprefix("seed")), runs.read_config(folder), folder)
