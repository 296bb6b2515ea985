"""What the engine asks about modules of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..ops.marks import PluginModule
from ..ops.swap import Swapped

Kept = Mapping[nn.Module, tuple[Tensor, ...]]  # channels of a layer (inputs, outputs) or norm


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm and no more: others' subclasses may have an activation in their forward."""
    classes = (each for each in type(module).__mro__ if not issubclass(each, Swapped))
    forward = next(vars(each)["forward"] for each in classes if "forward" in vars(each))
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and forward is nn.modules.batchnorm._BatchNorm.forward


def is_watched(model: nn.Module) -> bool:
    """Whether somebody's hooks are to see the inputs and outputs of single modules."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    if any(getattr(nn.modules.module, f"_global_{kind}") for kind in kinds):
        return True
    hooks = (
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks
        for each in _below(model)
        if each is not model
    )
    return any(hooks)


def reads_all_channels(model: nn.Module) -> bool:
    """Whether activations of a plugin read means of all channels, as DyReLU does."""
    return any(isinstance(each, PluginModule) and any(True for _ in each.parameters()) for each in _below(model))


def _below(model: nn.Module) -> Iterator[nn.Module]:
    """A model and all modules in it, some of them twice: at every pass, and `modules()` takes ten times as long."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            yield module
            waiting += module._modules.values()


def all_channels(modules: Iterable[nn.Module]) -> Kept:
    """All channels of layers (inputs, outputs) and norms, as `Liveness.kept` gives those that must be computed."""
    return {module: tuple(map(torch.arange, channels(module))) for module in modules}


def channels(module: nn.Module) -> tuple[int, ...]:
    """How many channels a layer reads and writes, or a norm has."""
    if is_norm(module):
        return (module.num_features,)
    outputs, inputs = module.weight.shape[:2]
    return inputs * getattr(module, "groups", 1), outputs
