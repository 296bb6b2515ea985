"""The command line: `python -m east_plugins COMMAND`, also installed as `east`."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands.parsing import program
from .commands.waiting import told
from .errors import EastError, Interrupted, UnknownNameError

#: Command to its line of help; each is the `main` of the module of its name in `commands`.
COMMANDS = {
    "run": "run an existing script unmodified, with EAST attached to the host it builds",
    "train": "train one network with the built-in trainer",
    "compare": "train several methods and make a table and a plot",
    "cycles": "train in cycles, or prune and train in turn: SCULPT-ing, IMP, WR, LRR",
    "study": "which prune criterion, over growths, densities, update periods and seeds",
    "info": "parameters, memory and MACs of a network; no training",
    "analyze": "topology, gradient flow and activations of finished runs",
    "export": "write a run's sparse network as a deployable file",
    "experiment": "the paper's headline on one GPU, part by part",
    "bench": "timings as ratios, side by side in one process",
    "patch": "add the --east-* flags to a checkout of a published script",
    "plugins": "list everything registered",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0; 2 for wrong usage or input; 130 on Ctrl-C)."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it is caught that nobody reads on, as in `--help | head`
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EastError as error:
        from .options.sources import spoken

        print(f"east_plugins: {spoken(str(error))}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG):
            raise
        print(f"east_plugins: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        print(
            f"east_plugins: not enough memory: {str(error).splitlines()[0] if str(error) else 'Python ran out of it'}",
            file=sys.stderr,
        )
        return 2


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: torch says so by a `RuntimeError`, on the CPU without a class of its own."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _working_folder_last() -> None:
    """Rules of one's own, as module:function, lie in the working folder; a `yaml.py` there, in a run folder of somebody
    else's, must not be found before the installed one."""
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())] + [os.getcwd()]


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program()} COMMAND [flags]   (COMMAND --help lists its flags; --version)\n")
        print("\n".join(f"  {name:<10} {help}" for name, help in COMMANDS.items()))
        print(f"\nexamples:\n  {program()} train --method rigl+connected --out runs/a\n  {program()} analyze runs/a")
        return 0 if argv else 2
    if argv[0] != "run":  # which sets the path of its script
        _working_folder_last()
    if argv == ["--version"]:
        print(f"east_plugins {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UnknownNameError("command", argv[0], COMMANDS)
    name, *rest = argv
    quiet = "--quiet" in rest or (name == "run" and not any(word.startswith("--east") for word in rest))
    with contextlib.nullcontext() if quiet else told(name):
        command = importlib.import_module(f".commands.{name}", __package__)
        if name != "run":  # what a script says is its own
            return command.main(rest)
    return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
