"""The command `info`: what a network costs, dense and sparse, without training it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from ..ops import text
from ..options import flags, sources
from .parsing import parser

DEFAULTS = {"method": "rigl", "data": "cifar10"}  # where train has others


def main(argv: Sequence[str]) -> int:
    parse = parser(
        "info",
        "What a network costs; no training.",
        "info --model resnet34 --classes 100 --density 0.0005 --east-share",
        "info --model resnet50 --dctps --density 0.0001 --latency",
        late=sources.late,
    )
    parse.add_argument("--classes", type=int, metavar="N", help="outputs of the network (default: of --data, or 10)")
    parse.add_argument("--channels", type=int, metavar="N", help="channels of an image (default: of --data, or 3)")
    parse.add_argument("--latency", action="store_true", help="with --dctps: time inference beside plain layers")
    parse.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    sources.add_flags(parse)
    for name in DEFAULTS:
        action = flags.option_strings(parse)[f"--{name}"]
        if action.help:
            action.help = re.sub(r"\(default: .*\)$", f"(default: {DEFAULTS[name]})", action.help)
    given = vars(parse.parse_args(argv))
    classes, channels, timed, as_json = (given.pop(name) for name in ("classes", "channels", "latency", "json"))
    from ..measure.description import describe, latency
    from ..training import classes as known
    from ..training import datasets, images, models

    if given.get("model") == "help":
        print("\n".join([*models.names(), "torchvision:<name>", "timm:<name>"]))
        return 0
    defaults = {**DEFAULTS, **({"method": "rigl+cyclic"} if "recipe" in given else {})}
    options = sources.from_flags(given, **defaults)
    if datasets.source_of(options.data).table:
        raise UsageError(f"`data` {options.data}: info describes networks for images; train says a table's counts")
    own_channels, size = images.known_shape(options.data) or (3, 32)
    channels = own_channels if channels is None else channels
    classes = (known.count(options.data, options.data_dir) or 10) if classes is None else classes
    options = dataclasses.replace(options, image_size=options.image_size or size)
    report = describe(options, classes, channels)
    if timed:
        report["latency"] = latency(options, classes, channels)
    print(json.dumps(report) if as_json else as_text(report))
    return 0


def as_text(report: dict[str, Any]) -> str:
    """The same for people."""
    layers = [
        (
            layer["name"], "x".join(map(str, layer["shape"])), f"{layer['density']:.6f}",
            f"{round(layer['density'] * math.prod(layer['shape'])):,}",
        )
        for layer in report["layers"]
    ]  # fmt: skip
    on_path = round(report["effective_density"] * report["maskable"])
    totals = [
        ("parameters", f"{report['parameters']:,}", f"{report['parameter_mib']:.2f} MiB"),
        ("stored", "", f"{report['stored_mib']:.2f} MiB, fixed matrices included"),
        ("maskable weights", f"{report['maskable']:,}", ""),
        ("active weights", f"{report['nonzeros']:,}", f"density {report['density']:.6f}"),
        ("  after the cycles", f"{report['nonzeros_end']:,}", ""),
        ("  on a path", f"{on_path:,}", f"effective density {report['effective_density']:.6f}"),
        ("dense inference", f"{report['dense_macs']:,}", "MACs"),
        ("sparse inference", f"{report['sparse_macs']:,}", "MACs"),
    ]
    blocks = [text.table(("layer", "shape", "density", "active"), layers, "<>>>")]
    blocks.append(text.table(("in all", "", ""), totals, "<><"))
    if "latency" in report:
        from ..measure import timing

        blocks.append(timing.as_text(report["latency"]))
    return "\n\n".join(blocks)
