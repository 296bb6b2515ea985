"""The training loss on some of the data as a function of the weights, for allocations that look at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...ops.modes import forked_rng, training_mode
from ...ops.substitute import spared_buffers, substituted

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Sample:
    """Batches of training data, one after the other, as many as are wanted; `loss(output, target)` is their mean loss.

    Raises `UsageError` where there is none, or no more and `batches` cannot be gone through again.
    """

    def __init__(self, batches: Iterable[Sequence[Tensor]], loss: Loss = F.cross_entropy):
        self.batches, self.loss = batches, loss
        self._coming: Iterator[Sequence[Tensor]] = iter(())

    def next(self) -> Batch:
        for _ in range(2):
            for batch in self._coming:
                if not (isinstance(batch, Sequence) and len(batch) == 2):
                    raise UsageError("`batches` must give pairs of inputs and targets")
                return batch[0], batch[1]
            self._coming = iter(self.batches)
        raise UsageError("`batches` gave no batch; allowed is what can be gone through again, such as a DataLoader")

    def of_each_class(self, count: int, classes: int) -> list[Batch]:
        """`count` examples of each class 0 to `classes - 1`, in the sizes in which they come; of a class that three
        passes over the data do not have so often, what there is."""
        missing = dict.fromkeys(range(classes), count)
        found: list[Batch] = []
        passes, self._coming = 0, iter(())
        while any(missing.values()) and passes < 3:
            passes += 1
            self._coming = iter(self.batches)
            for x, y in self._coming:
                if y.dim() != 1 or y.is_floating_point():
                    raise UsageError(f"targets must be one class number an example, got {list(y.shape)} of {y.dtype}")
                kept = []
                for i, label in enumerate(y.tolist()):
                    if missing.get(label, 0):
                        missing[label] -= 1
                        kept.append(i)
                if kept:
                    found.append((x[kept], y[kept]))
                if not any(missing.values()):
                    break
        if not found:
            raise UsageError(f"`batches` gave no example of a class from 0 to {classes - 1}")
        return found


class LossOfWeights:
    """The loss of a model as a function of some of its weights, for as long as the block lasts; the model, its buffers
    and PyTorch's random state are then as they were before.

    Args:
        names: of weights; `lstm.weight_ih_l0[2]` is one of several matrices, one below the other in a parameter.

    Attributes:
        keys: names of the matrices in each parameter, in their order.
        weights: the parameters' values.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], sample: Sample):
        self.model, self.sample = model, sample
        self.keys: dict[str, list[str]] = {}
        for name in names:
            self.keys.setdefault(name.partition("[")[0], []).append(name)
        self._parameters = {name: model.get_parameter(name) for name in self.keys}
        self.weights = {name: parameter.detach() for name, parameter in self._parameters.items()}

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model is in training mode, as it is when gradients are computed."""
        device = next(iter(self.weights.values())).device
        with training_mode(self.model, True), forked_rng(device), spared_buffers(self.model), torch.enable_grad():
            yield

    def output(self, leaves: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What the model makes of a batch with `leaves` as its weights."""
        x = batch[0].to(next(iter(leaves.values())).device)
        with substituted(self.model, {id(own): leaves[name] for name, own in self._parameters.items()}):
            return self.model(x)

    def loss(self, leaves: Mapping[str, Tensor], batch: Batch, temperature: float = 1.0) -> Tensor:
        """The loss of a batch with outputs over `temperature`."""
        output = self.output(leaves, batch)
        return self.sample.loss(output if temperature == 1 else output / temperature, batch[1].to(output.device))

    def leaves(self, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights, zero outside of masks, as leaves of a graph."""
        values = self.weights if masks is None else {n: torch.where(masks[n], w, 0) for n, w in self.weights.items()}
        return {name: value.detach().clone().requires_grad_() for name, value in values.items()}

    def gradients(self, masks: Mapping[str, Tensor] | None = None, batches: int = 1) -> dict[str, Tensor]:
        """Dense gradients at the masked weights, averaged over the next `batches`."""
        total = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for _ in range(batches):
            leaves = self.leaves(masks)
            for name, grad in gradient_of(self.loss(leaves, self.sample.next()), leaves).items():
                total[name] += grad.detach() / batches
        return total

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the parameters' shapes as those of the matrices."""
        parts = ((keys, tensors[name].chunk(len(keys))) for name, keys in self.keys.items())
        return {key: part for keys, chunks in parts for key, part in zip(keys, chunks, strict=True)}


def gradient_of(loss: Tensor, leaves: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    """Gradients by name; zero for what the loss does not depend on."""
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))
