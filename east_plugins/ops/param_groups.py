"""Parameters of plugins in somebody else's optimizer.

A new param group would break LR schedulers made before (`LambdaLR` has one function a group), so parameters join a
group that exists; learning rate and weight decay are then that group's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError


def join(optimizer: Optimizer, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Add those of the model's `parameters` that the optimizer lacks to the group of the model's first parameter.

    Raises `UsageError` where the optimizer holds no parameter of the model.
    """
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    group = next((group_of[parameter] for parameter in model.parameters() if parameter in group_of), None)
    if group is None:
        raise UsageError("the optimizer holds no parameter of the model")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        if parameter not in group_of:
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(names[parameter])


def leave(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove `parameters` and their state from the optimizer; the groups stay, and so do LR schedulers."""
    gone = set(parameters)
    for group in optimizer.param_groups:
        kept = [i for i, parameter in enumerate(group["params"]) if parameter not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def begin(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give `parameters`, which are going to have their first gradient, the zero momentum that fused SGD wants where
    others have theirs (`torch._fused_sgd_` takes buffers of all or of none)."""
    first = set(parameters)
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group.get("fused") and group["momentum"]:
            for parameter in first.intersection(group["params"]):
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
