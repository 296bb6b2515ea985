"""The command `info`: what a network costs, dense and sparse, without training it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..errors import UsageError
from ..host.masking import Masking
from ..measure.costs import costs
from ..ops.paths import effective_density
from ..options import config, flags
from ..options.config import Config
from ..plugins import activation as activations
from ..plugins import registry
from ..plugins.activation.phased import attach
from ..plugins.density import Constant
from ..training import images, models, runs
from . import bench


def main(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="east_plugins info", description="What a network costs; no training.")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="outputs of the network (default: 10)")
    parser.add_argument("--channels", type=int, metavar="N", help="channels of an image (default: of --data, or 3)")
    parser.add_argument("--latency", action="store_true", help="with --dctps: time inference beside plain layers")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    config.add_flags(parser)
    given = vars(parser.parse_args(argv))
    classes, channels, timed, as_json = (given.pop(name) for name in ("classes", "channels", "latency", "json"))
    if given.get("model") == "help":
        print("\n".join([*models.names(), "torchvision:<name>"]))
        return 0
    options = config.from_flags(given, method="rigl", data="cifar10")
    own_channels, size = images.known_shape(options.data) or (3, 32)
    channels = own_channels if channels is None else channels
    options = dataclasses.replace(options, image_size=options.image_size or size)
    report = describe(options, classes, channels)
    if timed:
        report["latency"] = latency(options, classes, channels)
    print(json.dumps(report) if as_json else as_text(report))
    return 0


def describe(options: Config, classes: int, channels: int) -> dict[str, Any]:
    """Parameters, memory, MACs and layer densities of a configuration with an `image_size`, and the effective density
    of its mask.

    With DyReLU the parameters are those of the phase in which it is there; MACs are those of inference, after it.
    """
    if classes < 1 or channels < 1:
        raise UsageError(f"--classes and --channels must be at least 1, got {classes} and {channels}")
    options = options.resolve(steps_per_epoch=352)
    shape = (channels, options.image_size, options.image_size)
    model = runs.build_model(options, classes, shape)
    host = Masking(
        torch.optim.SGD(model.parameters()), growth_mode="random", schedule=Constant(options.density), seed=options.seed
    )
    host.add_module(
        model,
        options.density,
        options.sparse_init,
        input_shape=shape,
        allocation_options=options.allocation_options,
    )
    if options.east.dyrelu:
        factory = activations.factory(options.east.dyrelu_type, reduction=options.east.dyrelu_reduction)
        attach(model, factory, shape)
    report = dataclasses.asdict(costs(model, shape, host.name2nonzeros))
    report["effective_density"] = effective_density(model, host.masks, shape)
    report["density"] = report["nonzeros"] / report["maskable"]
    return report


def latency(options: Config, classes: int, channels: int, repeats: int = 15) -> dict[str, Any]:
    """Milliseconds of one inference (batch 1) with plain and with DCTpS layers, interleaved, and their ratio.

    The paper reports 1.5 times the latency for DCTpS (Section 4). Raises `UsageError` without `--dctps`.
    """
    if not options.dctps:
        raise UsageError("--latency needs --dctps, whose layers it times beside plain ones")
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = (channels, options.image_size, options.image_size)
    x = torch.zeros(1, *shape)
    networks = {
        "plain": runs.build_model(dataclasses.replace(options, dctps=False), classes, shape).eval(),
        "dctps": runs.build_model(options, classes, shape).eval(),
    }
    with torch.no_grad():
        candidates = {name: partial(network, x) for name, network in networks.items()}
        rows = bench.interleaved(candidates, repeats, x.device)
    return bench.report(rows, {"dctps_over_plain": ("dctps", "plain")})


def as_text(report: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{'layer':<32} {'shape':>18} {'density':>10} {'active':>9}",
        *(
            f"{layer['name']:<32} {'x'.join(map(str, layer['shape'])):>18} {layer['density']:>10.6f} "
            f"{round(layer['density'] * _size(layer['shape'])):>9,}"
            for layer in report["layers"]
        ),
        "",
        f"parameters         {report['parameters']:>14,}   {report['parameter_mib']:.2f} MiB",
        f"stored             {'':>14}   {report['stored_mib']:.2f} MiB, fixed matrices included",
        f"maskable weights   {report['maskable']:>14,}",
        f"active weights     {report['nonzeros']:>14,}   density {report['density']:.6f}",
        f"  on a path        {round(report['effective_density'] * report['maskable']):>14,}   "
        f"effective density {report['effective_density']:.6f}",
        f"dense inference    {report['dense_macs']:>14,}   MACs",
        f"sparse inference   {report['sparse_macs']:>14,}   MACs",
    ]
    if "latency" in report:
        lines += ["", bench.as_text(report["latency"])]
    return "\n".join(lines)


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def plugins(argv: Sequence[str]) -> int:
    """The command `plugins`: everything registered, with a line of help and where it comes from."""
    flags.Parser(prog="east_plugins plugins", description="What is registered, by kind.").parse_args(argv)
    for kind in registry.ALL:
        print(f"{kind.kind}:")
        for entry in kind.entries():
            print(f"  {entry.name:<18} {entry.help}  [{entry.source}]")
    return 0
