"""What a configuration of `train` costs, without training it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from ..errors import UsageError
from ..host import presets
from ..host.masking import Masking
from ..ops.paths import effective_density
from ..options.config import Config
from ..options.east import REFERENCE_STEPS_PER_EPOCH
from ..options.flags import check_size
from ..plugins import registry
from ..training import runs
from . import timing
from .costs import costs


def describe(options: Config, classes: int, channels: int) -> dict[str, Any]:
    """Parameters, memory, MACs and layer densities of a configuration with an `image_size`, and the effective density
    of its mask.

    With DyReLU the parameters are those of the phase in which it is there; MACs are those of inference, after it.
    """
    check_size("classes", classes)
    check_size("channels", channels)
    resolved = options.resolve(steps_per_epoch=REFERENCE_STEPS_PER_EPOCH)
    shape = _shape(options, channels)
    with options.origins.told():
        model = runs.build_model(resolved, classes, shape)
    if resolved.east.dyrelu:
        presets.activations(resolved, model, shape)
    optimizer = torch.optim.SGD(model.parameters())
    if registry.allocation.entry(resolved.sparse_init).meta.get("needs_data"):
        raise UsageError(f"`sparse_init` {resolved.sparse_init} looks at training data, and `info` has none")
    host = presets.hosted(Masking, resolved, model, optimizer, shape)
    report = dataclasses.asdict(costs(model, shape, host.name2nonzeros))
    report["nonzeros_start"] = host.nonzeros
    report["nonzeros_end"] = host.target_nonzeros(getattr(host.schedule, "close", resolved.steps) + 1)
    report["effective_density"] = effective_density(model, host.masks, shape)
    report["density"] = report["nonzeros"] / report["maskable"]
    return report


def latency(options: Config, classes: int, channels: int, repeats: int = 15) -> dict[str, Any]:
    """Milliseconds of one inference (batch 1) with plain and with DCTpS layers, interleaved, and their ratio.

    The paper reports 1.5 times the latency for DCTpS (Section 4). Raises `UsageError` without `dctps`.
    """
    if not options.dctps:
        raise UsageError("`latency` needs `dctps`, whose layers it times beside plain ones")
    if options.threads:
        torch.set_num_threads(options.threads)
    resolved = options.resolve(steps_per_epoch=REFERENCE_STEPS_PER_EPOCH)
    shape = _shape(options, channels)
    x = torch.zeros(1, *shape)
    networks = {
        "plain": runs.build_model(dataclasses.replace(resolved, dctps=False), classes, shape).eval(),
        "dctps": runs.build_model(resolved, classes, shape).eval(),
    }
    with torch.no_grad():
        rows = timing.interleaved({name: partial(network, x) for name, network in networks.items()}, repeats)
    return timing.report(rows, {"dctps_over_plain": ("dctps", "plain")})


def _shape(options: Config, channels: int) -> tuple[int, int, int]:
    assert options.image_size is not None
    return channels, options.image_size, options.image_size
