"""Other tensors in place of a model's own, for a while.

`torch.func.functional_call` does the same, but it puts back what it finds at the end under every name of a tensor: a
module that a network holds under two names is left with the substitutes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

Substitutes = Mapping[int, Tensor]  # by the id of the tensor that they stand in for


@contextlib.contextmanager
def substituted(model: nn.Module, tensors: Substitutes) -> Iterator[None]:
    """Inside, `tensors` stand wherever the model holds the parameter or buffer of that id; tied ones stay tied.

    Afterwards the model holds the very tensors that it held before.
    """
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    flat = {module: module._flat_weights for module in model.modules() if isinstance(module, nn.RNNBase)}
    before = [(table, name, own) for table in tables for name, own in table.items() if id(own) in tensors]
    try:
        for table, name, own in before:
            table[name] = tensors[id(own)]  # type: ignore[assignment]  # as functional_call does
        for rnn, weights in flat.items():
            rnn._flat_weights = [None if weight is None else tensors.get(id(weight), weight) for weight in weights]
        yield
    finally:
        for table, name, own in before:
            table[name] = own  # type: ignore[assignment]
        for rnn, weights in flat.items():
            rnn._flat_weights = weights


@contextlib.contextmanager
def spared_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, the model writes to copies of its buffers."""
    with substituted(model, {id(buffer): buffer.clone() for buffer in model.buffers()}):
        yield
