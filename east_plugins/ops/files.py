"""Files on disk: written so that a crash never leaves half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EastError, InUseError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, of the same suffix, to write to; at the end of the block it takes `path`'s place, with its
    permissions, and is on disk by then. Where the block raises, it is gone and `path` is as it was."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield unfinished
        if path.exists():
            os.chmod(unfinished, path.stat().st_mode)
        _sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk; some systems cannot open folders."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(number)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there complete or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def save_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """`torch.save`, complete or not at all; what was there before is kept as `previous`, where the disk can.

    Raises `EastError` where it cannot be written; what was there before is there still.
    """
    import torch  # what only writes text does not wait for it

    try:
        with replacing(path) as unfinished:
            torch.save(state, unfinished)
            if previous is not None:
                _keep(path, previous)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        before = "; the checkpoint before it is whole" if previous is not None and path.exists() else ""
        raise EastError(f"{path} cannot be written: {reason}{before}") from error


def _keep(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous`, too."""
    link = previous.with_name(f".{previous.stem}.{os.getpid()}.part{previous.suffix}")
    with contextlib.suppress(OSError):  # no file there yet, or a disk without links: one checkpoint is kept then
        os.link(path, link)
        os.replace(link, previous)


def check_archive(path: Path) -> None:
    """Raises `ValueError` where a part of a file of `torch.save` is not what was written, by its checksum."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} is damaged")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's for the block; raises `InUseError` where it is another one's. A process that dies
    leaves no lock behind."""
    try:
        import fcntl
    except ImportError:  # not on every platform
        yield
        return
    path = folder / LOCK
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InUseError(
                f"`out` {folder} is in use by {holder or 'another process'}: wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # not one that its holder has just removed
                break
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def check_folder(out: Path) -> None:
    """Raises `UsageError` where `out` is no folder to write in and cannot be made one; makes nothing."""
    try:
        out.exists()
    except OSError as error:  # such as a name too long
        raise UsageError(f"`out` {out} cannot be made: {error.strerror}") from error
    place = next((place for place in (out, *out.parents) if os.path.exists(place)), Path())
    if not place.is_dir():
        raise UsageError(f"`out` {out} cannot be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"`out` {out} cannot be made: {place} cannot be written to")


def make_folder(out: Path) -> None:
    """Make the folder `out` and its parents; raises `UsageError` where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`out` {out} cannot be made: {error.strerror}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors, in the order of their names."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
