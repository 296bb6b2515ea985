"""The `--east-*` flags in a checkout of a published script, for people who keep a fork.

A patch in `patches/` adds lines only and has no context, so that no line of anybody else is kept here; it names the
upstream commit and the SHA-256 of the one file that it fits. Several files of a checkout are changed together or not
at all.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

_HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Patch:
    """Lines added to one file: `added` maps a line number of the file before to the lines that follow it.

    `marker` is a path that tells the checkout it belongs to from others.
    """

    repository: str
    commit: str
    file: str
    sha256: str
    marker: str
    added: dict[int, tuple[bytes, ...]]

    def apply(self, content: bytes) -> bytes:
        """The content with the lines added."""
        lines = content.splitlines(keepends=True)
        for number in sorted(self.added, reverse=True):
            lines[number:number] = self.added[number]
        return b"".join(lines)

    def reverse(self, content: bytes) -> bytes | None:
        """The content with the lines taken out; None where they are not at their places."""
        lines = content.splitlines(keepends=True)
        for number, added in sorted(self.added.items()):
            if tuple(lines[number : number + len(added)]) != added:
                return None
            del lines[number : number + len(added)]
        return b"".join(lines)

    def fits(self, content: bytes | None) -> bool:
        return content is not None and hashlib.sha256(content).hexdigest() == self.sha256


def read(path: Path) -> Patch:
    """Parse one file of `patches/`."""
    head, _, body = path.read_bytes().partition(b"--- a/")
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
    added: dict[int, list[bytes]] = {}
    for line in body.splitlines(keepends=True)[2:]:
        if hunk := _HUNK.match(line.decode()):
            lines = added.setdefault(int(hunk[1]), [])
        else:
            lines.append(line[1:])
    return Patch(**fields, added={number: tuple(lines) for number, lines in added.items()})


def patches() -> list[Patch]:
    """All patches, from the repository or from where the package was installed with them."""
    beside, shared = Path(__file__).parents[2] / "patches", Path(sys.prefix) / "share" / "east_plugins" / "patches"
    return [read(path) for path in sorted((beside if beside.is_dir() else shared).glob("*.patch"))]


def changed(checkout: Path, reverse: bool = False) -> dict[Path, bytes]:
    """New contents of the files that the patches of this checkout change, or with `reverse` change back.

    Raises `UsageError` where no patch is for this checkout or it lies inside one, where a file differs from the one
    that its patch was made for, is patched already, or with `reverse` is not patched.
    """
    known = patches()
    here = _belonging(checkout, known)
    above = [] if (checkout / ".git").exists() else [*checkout.resolve().parents][::-1]
    if root := next((folder for folder in above if _belonging(folder, known)), None):  # CIFAR of GraNet looks like ITOP
        raise UsageError(f"patch: {checkout} lies inside {root}; CHECKOUT is the root of the repository")
    if not here:
        names = ", ".join(sorted({patch.repository for patch in known}))
        raise UsageError(f"patch: {checkout} is no checkout that a patch is for; there are patches for {names}")
    return {checkout / patch.file: _changed(checkout / patch.file, patch, reverse) for patch in here}


def _belonging(folder: Path, known: Sequence[Patch]) -> list[Patch]:
    """The patches that a checkout in this folder has the files for."""
    return [patch for patch in known if (folder / patch.marker).is_file() and (folder / patch.file).is_file()]


def _changed(path: Path, patch: Patch, reverse: bool) -> bytes:
    content = path.read_bytes()
    before = patch.reverse(content)
    patched = patch.fits(before)
    if reverse:
        if before is None or not patched:
            raise UsageError(f"patch --reverse: {path} does not have this patch, or was changed beside it")
        return before
    if patched:
        raise UsageError(f"patch: {path} is patched already; --reverse takes the patch out")
    if not patch.fits(content):
        raise UsageError(
            f"patch: {path} is not the file that the patch is for, that of {patch.repository} at commit "
            f"{patch.commit[:7]} (SHA-256 {patch.sha256[:12]}..., not {hashlib.sha256(content).hexdigest()[:12]}...)"
        )
    return patch.apply(content)
