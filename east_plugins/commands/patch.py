"""The command `patch`: the `--east-*` flags in a checkout of a published script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ops.files import write_atomically
from ..options import flags
from ..upstream import patching


def main(argv: Sequence[str]) -> int:
    """Patch the checkout, or take the patch out again."""
    parser = flags.Parser(
        prog="python -m east_plugins patch",
        description="Adds the --east-* flags to the published scripts in a checkout, for people who keep a fork: three "
        "lines a script. Only a file that is exactly the one its patch was made for is changed.",
    )
    known = ", ".join(sorted({patch.repository.removeprefix("https://github.com/") for patch in patching.patches()}))
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help=f"root of a checkout of one of {known}")
    parser.add_argument("--reverse", action="store_true", help="take the lines out again, which restores every byte")
    args = parser.parse_args(argv)
    for path, content in patching.changed(args.checkout, args.reverse).items():
        write_atomically(path, content)
        print(f"{'restored' if args.reverse else 'patched'} {path}")
    return 0
