"""The network inside a wrapper, and its masks under the names that it has there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.maskable import unwrap

_PREFIXES = ("module.", "_orig_mod.")


def unwrapped(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network inside DataParallel, torch.compile's wrapper or an averaged model, and its masks as booleans.

    Masks may have the wrapper's names or the network's, any name of a tied weight, and be floats of zeros and ones;
    the result has the first name of each. Raises `UsageError` for a mask of no parameter, of another shape, of other
    numbers, or one of two different masks for one tied weight.
    """
    model = unwrap(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for given, mask in masks.items():
        name = given
        while name not in parameters and (prefix := next(filter(name.startswith, _PREFIXES), None)):
            name = name.removeprefix(prefix)
        if name not in parameters:
            raise UsageError(f"masks: {given} is no parameter of {type(model).__name__}")
        if mask.shape != parameters[name].shape:
            raise UsageError(
                f"masks: {given} has shape {list(mask.shape)}, its weight has {list(parameters[name].shape)}"
            )
        active = mask.bool()
        if not torch.equal(active.to(mask.dtype), mask):
            raise UsageError(f"masks: {given} holds other numbers than 0 and 1")
        name = first[id(parameters[name])]
        if name in found and not torch.equal(found[name].cpu(), active.cpu()):
            raise UsageError(f"masks: {given} is another mask of the weight that is {name} too")
        found[name] = active
    return model, found
