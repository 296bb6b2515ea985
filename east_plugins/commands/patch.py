"""The command `patch`: the `--east-*` flags in a checkout of a published script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ops.files import write_atomically
from ..upstream import patching
from .parsing import parser


def main(argv: Sequence[str]) -> int:
    """Patch the checkout, or take the patch out again."""
    parse = parser(
        "patch",
        "Adds the --east-* flags to the published scripts in a checkout, for people who keep a fork: three "
        "lines a script. Only a file that is exactly the one its patch was made for is changed.",
        "patch ../In-Time-Over-Parameterization",
        "patch ../In-Time-Over-Parameterization --reverse",
    )
    known = ", ".join(sorted({patch.repository.removeprefix("https://github.com/") for patch in patching.patches()}))
    parse.add_argument("checkout", type=Path, metavar="CHECKOUT", help=f"root of a checkout of one of {known}")
    parse.add_argument("--reverse", action="store_true", help="take the lines out again, which restores every byte")
    args = parse.parse_args(argv)
    for path, content in patching.changed(args.checkout, args.reverse).items():
        write_atomically(path, content)
        print(f"{'restored' if args.reverse else 'patched'} {path}")
    return 0
