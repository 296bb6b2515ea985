"""The command line: `python -m east_plugins COMMAND`, also installed as `east`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .commands.parsing import program
from .errors import EastError, UnknownNameError

#: Command to module, function, and its line of help.
COMMANDS = {
    "run": ("upstream.launch", "main", "run an existing script unmodified, with EAST attached to the host it builds"),
    "train": ("__main__", "train", "train one network with the built-in trainer"),
    "compare": ("training.compare", "main", "train several methods and make a table and a plot"),
    "info": ("commands.info", "main", "parameters, memory and MACs of a network; no training"),
    "analyze": ("commands.analyze", "main", "topology, gradient flow and activations of finished runs"),
    "export": ("commands.export", "main", "write a run's sparse network as a deployable file"),
    "experiment": ("commands.experiment", "main", "the paper's headline on one GPU, part by part"),
    "bench": ("commands.bench", "main", "timings as ratios, side by side in one process"),
    "patch": ("upstream.patching", "main", "add the --east-* flags to a checkout of a published script"),
    "plugins": ("commands.info", "plugins", "list everything registered"),
}


def train(argv: Sequence[str]) -> int:
    """The command `train`."""
    from .options import config, flags
    from .training.trainer import train

    parser = flags.Parser(prog="east_plugins train", description="Train one network; flags have ITOP's names.")
    parser.add_argument("--out", type=flags.folder, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    config.add_flags(parser)
    given = vars(parser.parse_args(argv))
    out, resume, quiet = (given.pop(name) for name in ("out", "resume", "quiet"))
    options = config.from_flags(given)
    summary = train(options, out, resume, quiet)
    validation = f" (validation {summary['best_validation_accuracy']:.2%})" if options.validation else ""
    print(
        f"test accuracy {summary['test_accuracy']:.2%} of the network of epoch {summary['best_epoch']}{validation}, "
        f"{summary['nonzeros']:,} of {summary['maskable']:,} weights active; {out}"
        + ("; loss is not finite" if summary.get("diverged") else "")
    )
    return 0


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
        print(f"east_plugins: {error}", file=sys.stderr)
        return 130 if type(error).__name__ == "Interrupted" else 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program()} COMMAND [flags]   (COMMAND --help lists its flags)\n")
        print("\n".join(f"  {name:<10} {help}" for name, (_, _, help) in COMMANDS.items()))
        print(f"\nexamples:\n  {program()} train --method rigl+connected --out runs/a\n  {program()} analyze runs/a")
        return 0 if argv else 2
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, "")  # rules of one's own, as module:function, lie in the working folder
    if argv == ["--version"]:
        print(f"east_plugins {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UnknownNameError("command", argv[0], COMMANDS)
    module, function, _ = COMMANDS[argv[0]]
    return getattr(importlib.import_module(f"east_plugins.{module}"), function)(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
