"""Which weights of a model are maskable: those of convolutions and linear layers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .marks import PluginModule


def walk(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every module in the order of `named_modules`, a module once.

    A `PluginModule` and all inside it are a plugin's own and left out.
    """

    def inside(prefix: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if module in seen or isinstance(module, PluginModule):
            return
        seen.add(module)
        yield prefix, module
        for name, child in module.named_children():
            yield from inside(f"{prefix}.{name}" if prefix else name, child)

    seen: set[nn.Module] = set()
    yield from inside("", model)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every convolution and linear layer, as `walk` finds them."""
    return ((name, module) for name, module in walk(model) if isinstance(module, (_ConvNd, nn.Linear)))


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Maskable weights by parameter name; a tied weight once, under the first of its names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers(model):
        found.setdefault(id(module.weight), (f"{name}.weight" if name else "weight", module.weight))
    return dict(found.values())


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layer of every maskable weight, by the weight's name; of a tied weight the first."""
    found: dict[int, nn.Module] = {}
    for _, module in layers(model):
        found.setdefault(id(module.weight), module)
    return {name: found[id(weight)] for name, weight in maskable(model).items()}


def theoretical_size(model: nn.Module) -> int:
    """Number of maskable weights of the unshared network: every layer's weight counts, tied or not (EAST, 3.2)."""
    return sum(module.weight.numel() for _, module in layers(model))


def output_of(module: nn.Module | None, places: Sequence[Tensor]) -> Tensor:
    """The output channel that weights of a layer feed, from their coordinates in its weight tensor."""
    if not isinstance(module, _ConvTransposeNd):
        return places[0]
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    return places[0] // inputs * outputs + places[1]


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile's wrapper or an `AveragedModel`."""
    while (inner := getattr(module, "_orig_mod", None) or _data_parallel_inner(module)) is not None:
        module = inner
    return module


def _data_parallel_inner(module: nn.Module) -> nn.Module | None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    return module.module if isinstance(module, wrappers) else None
