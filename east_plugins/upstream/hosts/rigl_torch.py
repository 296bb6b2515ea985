"""rigl-torch's `RigLScheduler` as in DCTpS (IlanPrice/DCTpS, `rigl_torch/RigL.py`)."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...host.masking import Masking
from ...ops.marks import leave_out
from ...plugins.density import Constant
from ...plugins.rate import Cosine
from ..adapter import Adapter, Attached, Driven, theirs
from ..replacing import replaced


class _Driven(Driven):
    delta_T: int

    def __call__(self) -> bool:
        go_on = theirs(super()).__call__()
        self.east.stepped()
        self.delta_T = self.east_adapter.next_delta(self.east)
        return go_on

    def _rigl_step(self) -> None:
        with self.east.resizing():
            theirs(super())._rigl_step()


class RigLTorch(Adapter):
    """Everything happens in the constructor, masks are a list in the order of the weights `W` (None: a dense layer),
    and the optimizer skips its step at an update."""

    title = "rigl_torch"
    least_frequency = 2
    parameters = frozenset({"model", "optimizer", "dense_allocation", "T_end", "delta", "alpha", "static_topo"})
    driven = _Driven

    def __init__(self, host: Any):
        super().__init__(host)
        self.asked_density = host.dense_allocation
        self._frequency = host.delta_T
        names = {weight: name for name, weight in host.model.named_parameters()}
        self._index = {names[w]: i for i, w in enumerate(host.W) if host.backward_masks[i] is not None}
        self.dense = sum(w.numel() for w, mask in zip(host.W, host.backward_masks, strict=True) if mask is None)

    @property
    def rate_decay(self) -> Any:
        return None  # a function of the step

    @property
    def steps(self) -> int:
        return self.host.step

    @steps.setter
    def steps(self, value: int) -> None:
        self.host.step = value

    @property
    def model(self) -> nn.Module | None:
        return self.host.model

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {name: self.host.W[i] for name, i in self._index.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: self.host.backward_masks[i].clone() for name, i in self._index.items()}

    @torch.no_grad()
    def write(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.host.backward_masks[self._index[name]].copy_(mask)
        self.host.apply_mask_to_weights()
        self.host.reset_momentum()

    def gradient(self, name: str, weight: nn.Parameter) -> Tensor | None:
        return self.host.backward_hook_objects[self._index[name]].dense_grad

    def last_update(self, total_steps: int) -> int:
        return self.host.T_end

    def target_nonzeros(self, borrowed: int) -> int:
        return self.nonzeros + self.dense  # drawn exactly, by an allocation of its own

    def next_delta(self, attachment: Attached) -> int:
        """What `delta_T` has to be before the next backward pass, whose hook keeps the dense gradient by it."""
        return attachment.frequency(self.steps + 1) or sys.maxsize

    def begin(self, attachment: Attached) -> None:
        self.host.delta_T = self.next_delta(attachment)

    @classmethod
    def construct(cls, attachment: Attached, init: Callable[..., None], given: inspect.BoundArguments) -> None:
        """The constructor makes the masks: weights are tied before, and the connection made inside."""
        host, arguments = given.args[0], given.arguments
        asked = arguments.get("dense_allocation", 1)
        attachment.optimizer = arguments["optimizer"]
        with attachment.making_masks(arguments["model"]) as factor, _tied_weights_once(type(host)):
            arguments["dense_allocation"] = min(1.0, factor * asked)
            init(*given.args, **given.kwargs)
        adapter = cls(host)
        attachment.connect(adapter)
        adapter.asked_density = asked

    @staticmethod
    def own(given: dict[str, Any]) -> _OwnPruner:
        return _OwnPruner(**given)


@contextlib.contextmanager
def _tied_weights_once(host_class: type) -> Iterator[None]:
    """`get_W` lists a tied weight once, as `model.modules()` does; the constructor fails on it otherwise."""
    module: Any = sys.modules[host_class.__module__]
    get_w: Callable = module.get_W

    def once(model, return_linear_layers_mask=False):
        pairs = dict(zip(*get_w(model, return_linear_layers_mask=True), strict=True))
        return (list(pairs), list(pairs.values())) if return_linear_layers_mask else list(pairs)

    with replaced(module, "get_W", once):
        yield


class _OwnPruner:
    """Our host with rigl-torch's way of stepping: `if pruner(): optimizer.step()`."""

    def __init__(
        self,
        model,
        optimizer,
        dense_allocation=1,
        T_end=None,
        sparsity_distribution="uniform",
        delta=100,
        alpha=0.3,
        static_topo=False,
        **unused,
    ):
        for module in model.modules():
            if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and not weight.requires_grad:
                leave_out(module)  # DCTpS's fixed matrices are no maskable weights
        self.host = Masking(
            optimizer,
            death_rate_decay=Cosine(alpha, T_end, 0.0).__call__,  # a function: it does not run to the end of training
            growth_mode="gradient",
            schedule=Constant(dense_allocation, None if static_topo else delta, T_end),
        )
        self.host.add_module(model, density=dense_allocation, sparse_init=sparsity_distribution)

    def __call__(self) -> bool:
        self.host.step()
        return False

    def __str__(self) -> str:
        return f"east_plugins.Masking({self.host.nonzeros} of {self.host.theoretical_size} weights active)"
