"""What the engine leaves to dense passes from the start."""

from __future__ import annotations

from torch import nn

from ..host.masking import Masking
from ..ops import distributed
from ..ops.maskable import layers
from ..plugins.transform.sharing import scale_of
from . import kernel
from .layers import PLAIN


def obstacle(host: Masking, model: nn.Module) -> str | None:
    """Why an engine cannot compute this model for this host."""
    if "momentum" in host.needs:
        return (
            "a rule needs the dense gradient at every step "
            f"(growth_mode={host.growth_mode!r}, redistribution_mode={host.redistribution_mode!r}); "
            "choose growth_mode 'gradient', 'random' or 'random_unfired' and redistribution_mode 'none'"
        )
    if distributed.active():
        return "DistributedDataParallel reduces dense gradients"
    for name, module in layers(model):
        plain = type(module).forward in PLAIN or scale_of(module) is not None
        if module.weight.dtype not in kernel.REAL:
            return f"layer {name} is of {module.weight.dtype}, and not of float32 or float64"
        if not plain or "weight" not in module._parameters:
            return f"layer {name} ({type(module).__name__}) computes with its weight in its own way"
    return None
