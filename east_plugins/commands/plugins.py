"""The command `plugins`: what can be named in flags and configuration files."""

from __future__ import annotations

from collections.abc import Sequence

from ..options import methods
from ..options.plugged import SLOTS
from ..plugins import registry
from .parsing import parser


def main(argv: Sequence[str]) -> int:
    """The methods; then everything registered, by kind, with a sentence of help, its source and its options."""
    parser(
        "plugins",
        "What can be named in flags and files, by kind: a line each, with the flags of its own options.",
        "plugins",
        "plugins | grep connected",
    ).parse_args(argv)
    for title, presets in (("method", methods.METHODS), ("trick (+NAME behind a method)", methods.TRICKS)):
        print(f"{title}:")
        for name, preset in presets.items():
            settings = ", ".join(f"{key}={value}" for key, value in preset.settings.items())
            print(f"  {name:<18} {settings or 'no settings of its own'}  [{preset.source}]", flush=True)
    prefixes = {slot.kind: slot.prefix for slot in SLOTS}
    for kind in registry.ALL:
        print(f"{kind.kind}:")
        for entry in kind.entries():
            print(f"  {entry.name:<18} {entry.help}  [{entry.source}]")
            for field in entry.options:
                flag = f"--{prefixes[kind.kind]}{field.name}".replace("_", "-")
                default = "" if field.default is None else f" (default: {field.default})"
                print(f"  {'':<18}   {flag}: {field.metadata['help']}{default}")
    return 0
