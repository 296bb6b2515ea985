"""What a network computes in evaluation, as a short list of tensor operations.

The network runs once on one input while every PyTorch operation that this input reaches is noted. What does not
depend on the input (a lent weight times its scale, a DCT matrix plus sparse weights) is a plain number by then, and
below modules and functions there are few operations.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UsageError
from ..plugins.activation.phased import OFF, PhasedActivation
from ..plugins.transform.dct import DCTLayer, materialize
from .node import Graph
from .operations import Operations
from .tracer import planes
from .unwrapped import unwrapped


def trace(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> Graph:
    """The operations of `model` with its masks applied, in evaluation mode; the model is left as it was.

    Raises `UsageError` that names the layer whose operation is not supported.
    """
    model = masked_copy(model, masks)
    x = torch.zeros(1, *input_shape)
    with torch.no_grad(), _plain_attention(), Operations(model, x) as tracer:
        output = model(x)
    if not isinstance(output, Tensor):
        raise UsageError(f"export needs a network that returns one tensor, got {type(output).__name__}")
    value = tracer.value(output)
    last = tracer.pick(value.node, value.places.reshape(planes(output.shape)))
    return Graph(tracer.nodes, last, tuple(input_shape), tuple(output.shape[1:]))


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Inside, attention is products and softmax, and no operation of its own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode, in float32 on the CPU, its inactive weights zero and DCT layers made plain; of a
    wrapped model that of the network inside.

    Raises `UsageError` where activations are still being phased out, and for masks as `unwrapped`.
    """
    model, masks = unwrapped(model, masks)
    if any(isinstance(module, PhasedActivation) and module.phase != OFF for module in model.modules()):
        raise UsageError("export needs a network whose activations are phased out: train past `east_dyrelu_end`")
    model = copy.deepcopy(model).cpu().float().eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.cpu(), 0)
    if any(isinstance(module, DCTLayer) for module in model.modules()):
        materialize(model)
    return model
