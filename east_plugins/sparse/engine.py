"""The engine: decides for every forward pass of a masked model what is computed, and how."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..host.masking import Masking
from ..host.packed import Copies
from ..ops.active import Active
from ..ops.maskable import layers, maskable, unwrap
from ..ops.modes import forked_rng
from ..ops.substitute import spared_buffers
from ..ops.swap import restore, swap
from .check import Check, unseen
from .compared import Compared
from .copies import CompiledCopies
from .faster import Times
from .gradient import GradientPlan, gradient_plans
from .layers import LayerPlan, NormPlan, Planned, Sink, Slot, in_backward
from .limits import obstacle
from .liveness import Liveness
from .modules import Kept, all_channels, is_norm, is_watched, reads_all_channels

logger = logging.getLogger(__name__)

ENGINES = ("auto", "dense", "sparse")

Plans = Mapping[nn.Module, LayerPlan | GradientPlan | NormPlan]


class Engine:
    """Sparse forward and backward passes for the model of a host, with the dense ones' results.

        mask.add_module(model, density=0.0005, sparse_init="connected", input_shape=(3, 32, 32))
        engine = Engine(mask, input_shape=(3, 32, 32))

    Nothing else changes in the script. Convolutions and linear layers sum over their active weights; channels that no
    active weight touches are left out of everything, where that is exact for the network (`liveness`). The model's own
    forward runs. On the step before a topology update by a rule that needs the dense gradient, that gradient is found
    from the same channels (`gradient`), or for networks that are not convolutions and linear layers after them by a
    dense step.

    The model takes one tensor; calls with other arguments are dense. Before plans are used, outputs and gradients are
    compared with the dense ones in float64 (`check`); a network in which they differ is computed densely.

    `.grad` of a masked weight is the gradient of its active values, a dense tensor that is zero elsewhere, after every
    backward pass of the model, be it sparse or dense; rules that grow by the dense gradient get it from here. So do
    clipping and logs see one and the same norm at every step. `torch.autograd.grad` of a weight gives the same.
    While somebody's hooks hang on a masked weight, passes are dense, and the hooks get dense gradients. Gradients
    cannot be differentiated again. Where dropout follows channels that were left out, it draws other random numbers
    than in the dense network.

    Args:
        host: our host, after `add_module`.
        input_shape: (channels, height, width) of one input.
        engine: "sparse"; "dense", which attaches nothing; or "auto": per batch size and number of active weights
            whichever of both is faster, measured on this machine (`faster`); "dense" on an accelerator.
    """

    def __init__(self, host: Masking, input_shape: Sequence[int], engine: str = "auto"):
        if engine not in ENGINES:
            raise UsageError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.host, self.input_shape, self.choice = host, tuple(input_shape), engine
        self.model = unwrap(host.modules[0])
        self._times = Times(self.model)
        self.reason = "it was asked for" if engine == "dense" else obstacle(host, self.model)
        if engine == "auto" and self.reason is None and not all(w.is_cpu for w in host.weights.values()):
            self.reason = "on an accelerator dense passes are faster; `sparse` is there to be asked for"
        self._slots: dict[nn.Module, Slot] = {}
        self._sinks: dict[str, Sink] = {}
        self._plans: Plans | None = None
        self._gradient_plans: Plans | None = None
        self._gives_gradients: set[Any] = set()  # kinds of plans whose gradients were found right
        self._kept: Kept = {}
        self._masks: tuple | None = None
        self._liveness: Liveness | None = None
        known = {id(weight): name for name, weight in host.weights.items()}
        self._weights = {known.get(id(weight), name): weight for name, weight in maskable(self.model).items()}
        named = {id(weight): name for name, weight in self._weights.items()}
        self._names = {module: named[id(module.weight)] for _, module in layers(self.model)}
        self._versions: list[int] | None = None
        self._foreign = self._hooked = False
        self._narrow = self._fuses = True
        self._check = Check(self.model, self._forcing, input_shape)
        self._agreed: set[Any] = set()  # modes in which the present plans are right
        self._compared = Compared()
        self._handles: list[Any] = []
        self._thread = _Thread()
        self._lock = threading.RLock()
        if self.reason is None:
            self._attach()
        elif engine != "dense":
            unwanted = engine == "sparse" or "momentum" in host.needs  # the latter is ITOP's default, not a choice
            logger.log(logging.WARNING if unwanted else logging.INFO, "the engine is dense: %s", self.reason)

    def remove(self) -> None:
        """Leave the model as it was before."""
        for module in self._slots:
            restore(module, Planned)
            del module.east_slot
        for handle in self._handles:
            handle.remove()
        self._slots, self._handles, self.host.engine = {}, [], None
        self.host.packed.copies = Copies

    @property
    def dense(self) -> bool:
        """Whether every forward pass is dense."""
        return self.reason is not None

    def holds_gradient(self, name: str) -> bool:
        """Whether the gradient of a weight is one of active values only."""
        return name in self._sinks and self._sinks[name].holds_gradient()

    def masks_gradient(self, name: str) -> bool:
        """Whether the gradient of a weight is one of active values only, and nobody else wrote to it."""
        return self.holds_gradient(name) and self._sinks[name].is_clean()

    def scale_gradients(self, factor: Tensor) -> list[Tensor]:
        """Multiply the gradients that are of active values only; returns their weights, masked or not."""
        found = [sink for name, sink in self._sinks.items() if self.masks_gradient(name)]
        for sink in found:
            sink.scale(factor)
        return [sink.weight for sink in found]

    def dense_gradients(self) -> dict[str, Tensor]:
        """Gradients of all weights by name, of the passes since the last step; there is none where the next step has
        no update by a rule that needs it."""
        return {name: sink.dense for name, sink in self._sinks.items() if sink.dense is not None}

    def take_gradients(self) -> dict[str, Tensor]:
        """The same, and none are left: passes from here on begin anew."""
        found = self.dense_gradients()
        for sink in self._sinks.values():
            sink.dense = None
        return found

    def stepped(self) -> None:
        """Called by the host at the end of a step: whatever changed in the weights since the last one was its own."""
        self._versions = [weight._version for weight in self._weights.values()]
        for sink in self._sinks.values():
            sink.dense = None

    def __reduce__(self):
        """Copies and pickles of a host have no engine: its plans are for this very model."""
        return _no_engine, ()

    def state_dict(self) -> dict[str, Any]:
        """The times that `auto` has measured: with them a resumed run chooses alike."""
        return self._times.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._times.load_state_dict(state)

    # ------------------------------------------------------------------ around every forward pass

    def _attach(self) -> None:
        for module in (*self._names, *filter(is_norm, self.model.modules())):
            module.east_slot = self._slots[module] = Slot()
            swap(module, Planned)
        enter, leave = map(torch.compiler.disable, (self._enter, self._leave))  # here, as it imports the compiler
        self._handles = [
            self.model.register_forward_pre_hook(_Hook(enter)),
            self.model.register_forward_hook(_Hook(leave), always_call=True),
        ]
        for name, weight in self._weights.items():
            if weight.requires_grad:
                hook = _Hook(functools.partial(_accumulated, weakref.ref(self), name))
                self._handles.append(weight.register_post_accumulate_grad_hook(hook))
        self.host.engine = self
        self.host.packed.copies = CompiledCopies

    def _enter(self, model: nn.Module, args: tuple) -> None:
        if self._thread.forced:
            plans = self._thread.forced[-1]
        else:
            usual = len(args) == 1 and isinstance(args[0], Tensor) and args[0].numel() > 0
            with self._lock:
                plans = self._choose(args[0]) if usual else None
        again = torch.is_grad_enabled()
        if plans is None and not self._thread.planned and not again:
            return
        self._thread.planned = plans is not None
        for module, slot in self._slots.items():
            slot.plan = plans.get(module) if plans else None
            if again:
                slot.last.plan = slot.plan

    def _leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not self._thread.planned:
            return
        self._thread.planned = False
        for slot in self._slots.values():
            slot.plan = None

    def _accumulated(self, name: str, weight: Tensor) -> None:
        """Autograd has added the dense gradient of a weight to `grad`; after sparse passes it has nothing to add."""
        sink = self._sinks.get(name)
        if weight.grad is None or (sink is not None and sink.holds_gradient() and sink.is_clean()):
            return
        if not self._thread.forced and name in self.host.masks and not self._hooked:
            self._sink(name).take(wanted=self.host.dense_gradient_next)

    def _sink(self, name: str) -> Sink:
        """The sink of a weight, at the positions that are active by now."""
        weight, before = self._weights[name], self._sinks.get(name)
        if name not in self.host.masks:
            active = before.active if before else Active(torch.ones_like(weight, dtype=torch.bool))
        else:
            active = self.host.active(name)
        if before is None or before.active is not active:
            self._sinks[name] = Sink(weight, active, before)
        return self._sinks[name]

    def _choose(self, x: Tensor) -> Plans | None:
        """The plans of a forward pass, None for a dense one."""
        training = torch.is_grad_enabled()
        if training and self.host.dense_gradient_next and not in_backward():
            for sink in self._sinks.values():
                sink.begin()
        if self.dense or self._is_hooked() or (self.choice == "auto" and self._was_slower(x)):
            return None
        if not self._weights_are_the_hosts() or not self._inactive_are_zero():
            return None
        masks = (*((id(mask), mask._version) for mask in self._own_masks().values()), reads_all_channels(self.model))
        if masks != self._masks:
            self._plans, self._masks, self._gradient_plans = self._plan(), masks, None
        self._settle(x)
        if self._plans is None or (self.choice == "auto" and self._is_slower(x)):
            return None
        wanted = self.model.training and training and self.host.dense_gradient_next
        plans = self._with_dense_gradient(x) if wanted else self._plans
        return plans if plans is None or not is_watched(self.model) else {m: p.alone() for m, p in plans.items()}

    def _is_hooked(self) -> bool:
        """Whether somebody's hooks wait for the gradients of masked weights."""
        for name, weight in self._weights.items():
            ours = 1 if weight.requires_grad else 0
            if weight._backward_hooks or len(weight._post_accumulate_grad_hooks or ()) > ours:
                if not self._hooked:
                    logger.warning("dense passes: a hook hangs on the gradient of %s", name)
                self._hooked = True
                return True
        self._hooked = False
        return False

    def _weights_are_the_hosts(self) -> bool:
        """False inside `functional_call` and in replicas, whose weights are other tensors."""
        return all(module.weight is self._weights[name] for module, name in self._names.items())

    @torch.no_grad()
    def _inactive_are_zero(self) -> bool:
        """Whether the weights are those of the masks; looked at where somebody else than the host wrote to them."""
        versions = [weight._version for weight in self._weights.values()]
        if versions != self._versions:
            self._versions = versions
            self._foreign = any(bool(self._weights[n][~mask].any()) for n, mask in self._own_masks().items())
            if self._foreign:
                logger.warning("dense passes: the model holds weights that the host's masks do not know")
        return not self._foreign

    # ------------------------------------------------------------------ planning, once for a topology

    def _plan(self) -> Plans:
        self._agreed.clear()
        return self._plans_for(self._keep(), {name: self._sink(name) for name in self._weights})

    def _keep(self) -> Kept:
        """The touched channels; all of them in networks that mix channels in ways of their own."""
        if self._narrow:
            try:
                with self._forcing(None):
                    self._liveness = self._liveness or Liveness(self.model, self.input_shape)
                self._kept = self._liveness.kept({name: self._sink(name).active for name in self._own_masks()})
                return self._kept
            except Exception as error:
                logger.info("the channels of this network cannot be followed: %s", error)
                self._widen()
        self._kept = all_channels(self._slots)
        return self._kept

    def _widen(self) -> None:
        logger.warning("all channels are computed: the network does more with them than the engine can follow")
        self._narrow, self._fuses = False, True

    def _settle(self, x: Tensor) -> None:
        """See to it that the plans give the dense results in the model's mode, or there are none."""
        if self._plans is None or self.model.training in self._agreed:
            return
        if not self._compared.must_be(self._kind(), self._kept):
            self._agreed.add(self.model.training)
        while self._plans is not None and self.model.training not in self._agreed:
            kind = self._kind()
            gradients = "" if kind in self._gives_gradients or not self.model.training else "active"
            check = functools.partial(self._check.agrees, self._plans, x, self._masks_by_id(), gradients=gradients)
            if unseen(check):
                self._agreed.add(self.model.training)
                self._gives_gradients.add(kind)
                self._compared.agreed(kind, self._kept)
            elif self._fuses:
                self._fuses, self._plans = False, {module: plan.alone() for module, plan in self._plans.items()}
            elif self._narrow:
                self._widen()
                self._plans = self._plan()
            else:
                self.reason = "the sparse computation of this network gives another result than the dense one"
                logger.warning("the engine is dense from now on: %s", self.reason)
                self._plans = None

    def _kind(self) -> tuple[bool, ...]:
        """What plans are made for, beside the masks."""
        return self.model.training, self._narrow, self._fuses, reads_all_channels(self.model)

    def _masks_by_id(self) -> dict[int, Tensor]:
        return {id(self._weights[name]): mask for name, mask in self._own_masks().items()}

    def _own_masks(self) -> dict[str, Tensor]:
        """Masks of what is computed here; embeddings, recurrent layers and attention are the model's own business."""
        return {name: mask for name, mask in self.host.masks.items() if name in self._weights}

    def _plans_for(self, kept: Kept, sinks: dict[str, Sink]) -> Plans:
        split = self._narrow and reads_all_channels(self.model)
        fuses = self._fuses
        return {
            module: LayerPlan(module, sinks[self._names[module]], *kept[module], split, fuses) if module in self._names
            else NormPlan(module, *kept[module], fuses)
            for module in self._slots
        }  # fmt: skip

    def _with_dense_gradient(self, x: Tensor) -> Plans | None:
        """Plans that also give the dense gradients; None for networks in which they would come out wrong."""
        if not next(iter(self._weights.values())).is_cpu:  # its passes are compiled ones
            return None
        all_read = self._narrow and reads_all_channels(self.model)
        if self._gradient_plans is None:
            plans = gradient_plans(self._plans, self._kept, all_read)
            kind = "dense", all_read
            check = functools.partial(self._check.agrees, plans, x, {}, gradients="dense")
            if kind not in self._gives_gradients and unseen(check):
                self._gives_gradients.add(kind)
            if kind not in self._gives_gradients:
                logger.info("the step before this update is dense")
                return None
            self._gradient_plans = plans
        return self._gradient_plans

    @contextlib.contextmanager
    def _borrowed_gradients(self) -> Iterator[None]:
        """Gradients are None at first, and at the end what they were before."""
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient

    @contextlib.contextmanager
    def _forcing(self, plans: Plans | None) -> Iterator[None]:
        self._thread.forced.append(plans)
        try:
            yield
        finally:
            self._thread.forced.pop()

    # ------------------------------------------------------------------ measuring, for `auto`

    def _is_slower(self, x: Tensor) -> bool:
        """Whether the sparse passes of a training step take longer than the dense ones. Evaluation goes by what is
        known from training."""
        if self.model.training and torch.is_grad_enabled():
            measure = [functools.partial(unseen, functools.partial(self._measure, x, p)) for p in (self._plans, None)]
            self._times.settle(self._times.keys(x, self.host.nonzeros), measure)
        return self._was_slower(x)

    def _was_slower(self, x: Tensor) -> bool:
        return self._times.sparse_is_slower(self._times.keys(x, self.host.nonzeros))

    def _measure(self, x: Tensor, plans: Plans | None) -> float:
        """Seconds of a forward and backward pass, the better of two; nothing in the model changes."""
        if plans is not None:
            sinks: dict[int, Sink] = {}
            own = {id(weight): weight for weight in self._weights.values()}
            plans = {module: plan.apart(own, sinks) for module, plan in plans.items()}
        times = []
        with forked_rng(x.device):
            for _ in range(2):
                with self._borrowed_gradients(), spared_buffers(self.model), self._forcing(plans):
                    began = time.perf_counter()
                    outputs = [t for t in tree_leaves(self.model(x.detach())) if isinstance(t, Tensor)]
                    total = torch.stack([t.sum() for t in outputs if t.requires_grad]).sum()
                    total.backward()
                    total.detach().item()  # waits for the device
                    times.append(time.perf_counter() - began)
        return min(times)


class _Thread(threading.local):
    """What one thread's passes are."""

    def __init__(self) -> None:
        self.planned = False  # whether slots hold plans
        self.forced: list[Plans | None] = []  # plans for passes of our own


def _accumulated(engine: weakref.ref[Engine], name: str, weight: Tensor) -> None:
    """Of a weight's hook, which autograd keeps where Python's collector does not see it: it must not keep a model."""
    if (found := engine()) is not None:
        found._accumulated(name, weight)


def _no_engine() -> None:
    return None


class _Hook:
    """A hook of one model: copies and pickles of the model get one that does nothing."""

    def __init__(self, function: Callable | None = None):
        self.function = function

    def __call__(self, *args) -> None:
        if self.function is not None:
            self.function(*args)

    def __deepcopy__(self, memo):
        return _Hook()

    def __reduce__(self):
        return _Hook, ()
