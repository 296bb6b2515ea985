"""What a network costs: parameters, memory, multiply-accumulates of one inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.maskable import layers, maskable, theoretical_size
from ..ops.modes import training_mode
from ..plugins.transform.dct import is_dct, macs

MIB = 2**20


@dataclass(frozen=True)
class LayerCosts:
    """A maskable weight and the share of it that is active."""

    name: str
    shape: tuple[int, ...]
    density: float


@dataclass(frozen=True)
class Costs:
    """Costs of a network. `dataclasses.asdict` gives the object that `info --json` prints.

    Attributes:
        parameters: trainable parameters, shared ones once; norms' running statistics are not parameters.
        parameter_mib: their size in MiB, zeros included.
        stored_mib: that of all parameters and of the fixed matrices of DCT layers, one in*k*k x out a layer.
        maskable: maskable weights of the unshared network, what densities refer to.
        nonzeros: active weights.
        dense_macs: multiply-accumulates of the convolution and linear layers for one input.
        sparse_macs: the same, of active weights only, with a DCT layer's transform at n*log2(n)/2 an output
            position, n = max(in*k*k, out) (EAST, 4.1).
        layers: every maskable weight, shared ones once.
    """

    parameters: int
    parameter_mib: float
    stored_mib: float
    maskable: int
    nonzeros: int
    dense_macs: int
    sparse_macs: int
    layers: list[LayerCosts]


def costs(model: nn.Module, input_shape: tuple[int, ...], nonzeros: Mapping[str, int] | None = None) -> Costs:
    """Costs of `model` for one input of `input_shape` (without the batch's dimension).

    `nonzeros` gives the number of active weights by parameter name; weights that it lacks are dense. A weight
    counts at every use, so sharing adds multiply-accumulates but no parameters; plugins' own layers (DyReLU's)
    count as parameters only. The model runs once, in evaluation mode, and is left as it was.

    Raises `UsageError` where `nonzeros` names what is no maskable weight.
    """
    weights = maskable(model)
    if unknown := (nonzeros or {}).keys() - weights.keys():
        raise UsageError(f"nonzeros of {min(unknown)}: the model has no maskable weight of that name")
    active = {name: weight.numel() for name, weight in weights.items()} | dict(nonzeros or {})
    names = {id(weight): name for name, weight in weights.items()}
    uses = _uses(model, input_shape)
    dense = fixed = 0
    sparse = 0.0
    for _, layer in layers(model):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        dense += uses[layer] * weight.numel()
        sparse += uses[layer] * active[names[id(weight)]]
        if is_dct(layer):
            fixed += weight.numel() * weight.element_size()
            sparse += uses[layer] * macs(tuple(weight.shape), getattr(layer, "groups", 1))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Costs(
        parameters=sum(p.numel() for p in trainable),
        parameter_mib=_bytes(trainable) / MIB,
        stored_mib=(_bytes(model.parameters()) + fixed) / MIB,
        maskable=theoretical_size(model),
        nonzeros=sum(active.values()),
        dense_macs=dense,
        sparse_macs=round(sparse),
        layers=[LayerCosts(n, tuple(w.shape), active[n] / w.numel()) for n, w in weights.items()],
    )


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _uses(model: nn.Module, input_shape: tuple[int, ...]) -> Counter[nn.Module]:
    """How often each weight of a layer is multiplied for one input: the layer's output positions."""
    uses: Counter[nn.Module] = Counter()

    def count(layer, args, output):
        transposed = getattr(layer, "transposed", False)  # its weights meet every input position instead
        uses[layer] += (args[0] if transposed else output).numel() // len(layer.weight)

    hooks = [layer.register_forward_hook(count) for _, layer in layers(model)]
    parameter = next(model.parameters())
    try:
        with training_mode(model, False), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return uses
