"""The command `run`: an existing script as `__main__`, with EAST attached to the host that it builds."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from argparse import Namespace
from collections.abc import Sequence

from ..errors import UsageError
from ..options import flags
from ..upstream import launch, runner, shims
from ..upstream.replacing import replaced
from .parsing import program

HELP = """\
Runs SCRIPT as `python SCRIPT` would (with --module as `python -m`): its own arguments, folder and exit code.
EAST is attached to the host of masks that it builds. Without --east-* flags its results are those of plain python."""


def main(argv: Sequence[str]) -> int:
    """Run the script; the exit code is the script's."""
    parser = flags.Parser(
        prog=f"{program()} run",
        usage="%(prog)s [--module] SCRIPT [its arguments] [--east-* flags]",
        description=HELP,
        epilog=f"examples:\n  {program()} run main.py --sparse --density 0.05 --east-cyclic --east-compat\n"
        f"  {program()} run --module package.train --epochs 90 --east",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    launch.add_flags(parser)
    shims.add_flags(parser)
    args, rest = split(argv, parser)
    given = vars(args)
    if rest[:1] in (["-h"], ["--help"]):
        print(parser.format_help(), end="")
        return 0
    by_name = rest[:1] in (["-m"], ["--module"])
    script, arguments = (rest[1:2], rest[2:]) if by_name else (rest[:1], rest[1:])
    if not script or script[0].startswith("-"):
        raise UsageError("run needs a SCRIPT, or --module and a module's name, before the script's own arguments")
    given_shims = given.pop("east_compat", None)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(runner.entered(script[0], arguments, by_name))
        stack.enter_context(runner.lent_host())
        stack.enter_context(shims.installed(given_shims, folder))
        takeover = launch.Takeover(given, ours=frozenset(sys.modules) - {"__main__"}) if given else None
        if takeover:
            stack.enter_context(replaced(launch, "activate", lambda args: None))  # of a patched script
            stack.callback(takeover.uninstall)
            takeover.install()
        try:
            runner.run(script[0], by_name)
        except SystemExit as end:
            if end.code not in (None, 0):
                _close_early(takeover)
                raise
            if {"-h", "--help"} & set(arguments):
                print("\n" + "".join(parser.format_help().partition("\nexamples:")[0].partition("EAST (")[1:]))
                raise
        except BaseException as error:
            _close_early(takeover)
            if line := shims.advice(error, folder, given_shims):
                _add_note(error, line)
            raise
        if takeover:
            takeover.close()
            takeover.check_used(script[0])
    return 0


def _close_early(takeover: launch.Takeover | None) -> None:
    """The script's own exception goes before one of writing the state."""
    if takeover:
        try:
            takeover.close(early=True)
        except UsageError as error:
            print(f"east_plugins: {error}", file=sys.stderr)


def _add_note(error: BaseException, line: str) -> None:
    """A line below the traceback; before it on Python 3.10."""
    if hasattr(error, "add_note"):
        error.add_note(line)
    else:
        print(line, file=sys.stderr)


def split(argv: Sequence[str], parser: flags.Parser) -> tuple[Namespace, list[str]]:
    """The parsed `--east-*` flags, and everything else in its order; what follows `--` is the script's.

    Raises `UsageError` for a flag that cannot be, and for `--east-compat NAME`, whose name would be handed to the
    script.
    """
    words = list(itertools.takewhile("--".__ne__, argv))
    for flag, word in itertools.pairwise(words):
        if flag == "--east-compat" and shims.SHIMS.keys() >= set(word.split(",")):
            raise UsageError(
                f"--east-compat {word}: write --east-compat={word}, or where {word} is an argument of the script's, "
                "put it before --east-compat"
            )
    every = "--east-compat=" + ",".join(shims.SHIMS)  # so that it does not take the next word for its value
    args, rest = parser.parse_known_args([every if word == "--east-compat" else word for word in words])
    for word in rest:
        name = word.partition("=")[0].replace("_", "-")
        if name == "--east" or name.startswith("--east-"):
            parser.error(f"unrecognized arguments: {word}")
    return args, [*rest, *argv[len(words) :]]
