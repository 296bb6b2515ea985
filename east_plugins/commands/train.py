"""The command `train`: one network with the built-in trainer."""

from __future__ import annotations

from collections.abc import Sequence

from ..options import flags, plugged, sources
from . import parsing


def main(argv: Sequence[str]) -> int:
    """Train one network and print its result; returns the exit code."""
    parser = parsing.parser(
        "train",
        "Train one network; flags have ITOP's names.",
        "train --method rigl+connected --model resnet20 --density 0.01 --epochs 12 --out runs/a",
        "train --config configs/cifar10_resnet34.yaml --method east --density 0.0005 --data-dir DIR --out runs/b",
        late=sources.late,
    )
    parser.add_argument("--out", type=flags.folder, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    sources.add_flags(parser)
    given = vars(parser.parse_args(argv))
    out, resume, quiet = (given.pop(name) for name in ("out", "resume", "quiet"))
    if resume and given.get("config") is None and (out / "config.yaml").is_file():
        from ..plugins import registry

        registry.trust(given.get(name) for name in plugged.BY_SETTING)
        with registry.names_of_a_file():  # what is not said is as it was
            options = sources.from_flags({**given, "config": out / "config.yaml"})
    else:
        options = sources.from_flags(given)
    from ..training.trainer import DEAD, train  # PyTorch is not waited for where a flag is wrong

    summary = train(options, out, resume, quiet)
    if summary.get("unfinished"):
        print(
            f"unfinished: stopped by --limit-steps after {summary['steps']:,} of {summary['steps_in_all']:,} steps, "
            f"nothing was tested; loss {summary['loss']:.4f}, "
            f"{summary['nonzeros']:,} of {summary['maskable']:,} weights active; --resume --out {out} goes on"
        )
        return 0
    validation = f" (validation {summary['best_validation_accuracy']:.2%})" if options.validation else ""
    print(
        f"test accuracy {summary['test_accuracy']:.2%} of the network of epoch {summary['best_epoch']}{validation}, "
        f"{summary['nonzeros']:,} of {summary['maskable']:,} weights active; {out}"
        + ("; diverged: the loss was not finite, try a smaller --lr or --clip-norm" if summary.get("diverged") else "")
        + (f"; dead: {DEAD}" if not summary["effective_density"] else "")
    )
    return 0
