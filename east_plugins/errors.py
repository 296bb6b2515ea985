"""Typed exceptions. Whatever a user can get wrong is a `UsageError` with a one-line message; the command line
prints that line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EastError(Exception):
    """Base of all exceptions raised by east_plugins."""


class UsageError(EastError, ValueError):
    """A value, file or combination that cannot be used; the message names it and says what is allowed."""


MOST_NAMES = 80  #: that an error lists


class UnknownNameError(UsageError):
    """A name that is not registered; the message gives the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        spelled = {k.lower(): k for k in known}
        near = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}? known: " if near else "known: "
        more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}{', '.join(known[:MOST_NAMES])}{more}")


class DuplicateNameError(EastError):
    """A name registered twice."""


class NothingMatchedError(UsageError):
    """A plugin found nothing in the model that it could act on."""


class InUseError(UsageError):
    """A folder that another process writes to."""


class Interrupted(EastError):
    """Ctrl-C was pressed; what was done so far is saved."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed; the message gives the command that installs it."""


class RanksError(EastError):
    """The processes of a distributed run disagree, or one of them is gone."""
