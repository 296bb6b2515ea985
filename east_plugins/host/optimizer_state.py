"""Which state tensors an optimizer keeps for every weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import UsageError

#: Per-weight state of each known optimizer. All of them leave a weight that is zero, with zero gradient and zero
#: state, at zero; that is what lets a host mask gradients instead of weights. Add a class here to support it.
STATE_TENSORS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the state tensors of the optimizer's class; raises `UsageError` for an unknown class."""
    for cls in type(optimizer).__mro__:
        if cls in STATE_TENSORS:
            return STATE_TENSORS[cls]
    known = ", ".join(cls.__name__ for cls in STATE_TENSORS)
    raise UsageError(
        f"optimizer {type(optimizer).__name__} is not supported; allowed: {known}, "
        "or add its state to east_plugins.host.optimizer_state.STATE_TENSORS"
    )


def state_tensors(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    """The dense state tensors that exist so far for `weight`, each of the weight's shape (packed state is none)."""
    tensors = (optimizer.state.get(weight, {}).get(name) for name in state_names(optimizer))
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.shape == weight.shape]


def all_state_tensors(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    """The same for an optimizer of any class: whatever has the weight's shape."""
    tensors = optimizer.state.get(weight, {}).values()
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.shape == weight.shape]


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is known to treat every number by itself; a subclass may do anything."""
    return type(optimizer) in STATE_TENSORS


def momentum_factor(optimizer: torch.optim.Optimizer) -> float:
    """The optimizer's decay of past gradients (SGD's momentum, Adam's beta1); 0.9 where it has none."""
    group = optimizer.param_groups[0]
    return group.get("momentum", 0.0) or group.get("betas", (0.9,))[0]


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Identities of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def holds(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> bool:
    """Whether some of the weights are in an optimizer."""
    held = held_by(optimizer)
    return any(id(weight) in held for weight in weights)
