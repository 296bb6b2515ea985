"""Turning the layers of a model into DCT layers and back, in place."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ....errors import NothingMatchedError, UsageError
from ....ops import param_groups
from ....ops.maskable import layers
from ...registry import transform
from . import engines
from .layers import DCTConv1d, DCTConv2d, DCTConv3d, DCTLinear, is_dct

_DCT_CLASS: dict[Any, Any] = {nn.Conv1d: DCTConv1d, nn.Conv2d: DCTConv2d, nn.Conv3d: DCTConv3d, nn.Linear: DCTLinear}
_PLAIN_CLASS = {dct: plain for plain, dct in _DCT_CLASS.items()}


@transform.register("dctps")
def convert(
    model: nn.Module,
    match: str | Sequence[str] = "*",
    alpha: float | Mapping[str, float] = 1.0,
    *,
    trainable: bool = True,
    engine: str = "auto",
    optimizer: Optimizer | None = None,
) -> list[str]:
    """DCTpS: conv and linear layers get the weight alpha D + S, D a fixed DCT matrix, S sparse and zero at first.

    The layers stay the same objects and S their parameter `weight`, with zeros in it, so that names, masks and
    optimizers made before still hold; `alpha` is added to each. Layers of a subclass of nn.Conv1d, 2d, 3d or
    nn.Linear, with a parametrized weight, or in an nn.TransformerEncoderLayer, whose inference reads their weights
    without calling them, are left as they are.

    Args:
        match: shell pattern, or several, of the names of the layers to convert.
        alpha: the value that alpha starts at, one for all or by layer name (1 for names that it lacks).
        trainable: whether the alphas are parameters; where not, they are buffers.
        engine: "auto", "dense", "fft" or "separable", see `engines`.
        optimizer: one made before, which the alphas join.

    Returns the names of the layers converted. Raises `NothingMatchedError` where there are none, and `UsageError`
    for a model with DCT layers, a layer whose weight is another's too, an alpha for no such layer, or an unknown
    engine; the model is unchanged then.
    """
    engines.check(engine)
    if any(is_dct(module) for module in model.modules()):
        raise UsageError("the model has DCT layers (`dctps`) already")
    patterns = [match] if isinstance(match, str) else list(match)
    found = {
        name: layer for name, layer in layers(model) if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    _refuse_tied(model, found)
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    fused = {child for encoder in encoders for child in encoder.modules()}
    found = {
        name: layer
        for name, layer in found.items()
        if type(layer) in _DCT_CLASS and "weight" in layer._parameters and layer not in fused
    }
    if not found:
        raise NothingMatchedError(f"`dctps`: the model has no plain conv or linear layer named {' or '.join(patterns)}")
    alphas = alpha if isinstance(alpha, Mapping) else dict.fromkeys(found, alpha)
    if unknown := alphas.keys() - found.keys():
        raise UsageError(f"`dctps`: alpha is given for {min(unknown)!r}, which is none of {', '.join(found)}")
    if optimizer is not None:
        param_groups.join(optimizer, model, [])  # raises here, before anything is changed

    for name, layer in found.items():
        layer.__class__ = _DCT_CLASS[type(layer)]
        layer.add_offset(alphas.get(name, 1.0), trainable, engine)
    if optimizer is not None and trainable:
        param_groups.join(optimizer, model, [layer.alpha for layer in found.values()])
    return list(found)


def materialize(model: nn.Module) -> list[str]:
    """Make every DCT layer the plain layer with the weight alpha D + S: the same function, plain names, no alpha.

    The parameters stay the same objects; masks do not hold for them any more. Returns the names of the layers.
    Raises `NothingMatchedError` where the model has no DCT layers.
    """
    found = {name: module for name, module in model.named_modules() if type(module) in _PLAIN_CLASS}
    if not found:
        raise NothingMatchedError("materialize: the model has no DCT layers (`dctps`)")
    for layer in found.values():
        with torch.no_grad():
            layer.weight.copy_(layer.effective_weight())
        del layer.alpha, layer.engine
        layer.__dict__.pop("resting", None)
        layer.__class__ = _PLAIN_CLASS[type(layer)]
    return list(found)


def _refuse_tied(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, layer in found.items():
        if uses[id(layer.weight)] > 1:
            raise UsageError(
                f"`dctps` cannot be used on {name}, whose weight other layers share: weight sharing is left out with "
                f"DCT layers to prevent conflicts with the DCT matrices (EAST paper, Sec. 4)"
            )
