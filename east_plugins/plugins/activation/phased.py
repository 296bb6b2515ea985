"""An activation in place of every ReLU of any model, phased out to plain ReLU in the course of training.

Calls of `nn.ReLU`, `F.relu`, `torch.relu`, `Tensor.relu` and their in-place variants are found by one forward pass
under a `TorchFunctionMode`, and redirected by another while the module that makes them runs. No source is edited
and no parameter renamed; `remove` leaves the network as it was.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ...errors import NothingMatchedError, UsageError
from ...ops import param_groups
from ...ops.marks import PluginModule
from ...ops.modes import forked_rng
from ...ops.swap import Swapped, restore, swap
from .probe import FUNCTIONS, Activation, calls_of

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

FULL, BLEND, OFF = "full", "blend", "off"


@dataclass(frozen=True)
class PhaseOut:
    """beta as a function of the step: 1 until `start`, linear to 0 at `end` and 0 from there on (EAST, Sec. 3.1).

    Equal `start` and `end` switch at once. Raises `UsageError` where `end` comes before `start` or is not positive.
    """

    start: int
    end: int

    def __post_init__(self):
        if not 0 <= self.start <= self.end or self.end == 0:
            raise UsageError(
                f"`end` must be positive and not before `start` (at least 0), "
                f"got start {self.start} and end {self.end} in steps"
            )

    def beta(self, step: int) -> float:
        if step >= self.end:
            return 0.0
        return 1.0 if step <= self.start else 1 - (step - self.start) / (self.end - self.start)


class PhasedActivation(PluginModule, nn.Module):
    """What stands in for one ReLU call: `beta act(x) + (1 - beta) relu(x)`, or with `inside` what `act` makes of beta.

    `phase` is "full" (beta 1: `act` alone), "blend" or "off" (beta 0: the model's own ReLU runs and this module is
    not called). It is a Python value so that the ends cost nothing and torch.compile compiles three times at most;
    in between, beta changes on the device without synchronisation. The buffer is saved, so that a checkpoint means
    what it meant when it was written.
    """

    beta: Tensor

    axis = 1  #: of the channels; counted from the end where they come last

    def __init__(self, act: nn.Module, axis: int = 1, inside: bool = False, late: bool = False):
        super().__init__()
        self.act, self.inside, self.late = act, inside, late
        if axis != 1:
            self.axis = axis
        self.phase = self._phase(1.0)
        self.register_buffer("beta", torch.ones(()))

    def forward(self, x: Tensor, inplace: bool = False, plain: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        source = x.clone() if inplace else x
        y = self._act(source)
        if self.phase == BLEND and not self.inside:
            y = torch.lerp(plain(source), y, self.beta)
        return x.copy_(y) if inplace else y

    def _act(self, x: Tensor) -> Tensor:
        beta = (self.beta,) if self.phase == BLEND and self.inside else ()
        if self.axis == 1 or x.dim() < 3:
            return self.act(x, *beta)
        return self.act(x.movedim(self.axis, 1), *beta).movedim(1, self.axis)

    def _phase(self, beta: float) -> str:
        return OFF if beta == 0 or (beta == 1 and self.late) else FULL if beta == 1 else BLEND

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the model's own ReLU runs."""
        before, self.phase = self.phase, OFF
        try:
            yield
        finally:
            self.phase = before

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.phase = self._phase(float(self.beta))


class Sites(PluginModule, nn.ModuleList):
    """The `PhasedActivation`s of one module, in the order of its ReLU calls in a forward pass of the model."""

    def __init__(self, modules, replaces: Sequence[str] = ("relu",)):
        super().__init__(modules)
        self.replaces = replaces  # names of the activations that are calls of these sites
        self.calls = 0  # where the forward pass is being compiled; else every thread counts its own

    def restart(self) -> None:
        """A forward pass of the model begins."""
        if torch.compiler.is_compiling():
            self.calls = 0
        else:
            _running.calls[id(self)] = 0

    def forward(self, x):
        """The identity: where the module is an nn.Sequential this is the last of its children."""
        return x

    def next(self) -> PhasedActivation:
        if torch.compiler.is_compiling():
            number, self.calls = self.calls, self.calls + 1
        else:
            number = _running.calls.get(id(self), 0)
            _running.calls[id(self)] = number + 1
        site = self[number % len(self)]
        assert isinstance(site, PhasedActivation)
        return site


class _Phased(Swapped, _Module):
    """Mixed into the class of every module that calls ReLU itself, and into the model's.

    Such a module holds its `Sites` as `east_activations`; the model lists all of them in `east_order`, to start
    counting calls anew at each of its forward passes.
    """

    east_order: Sequence[Sites] = ()

    @property
    def _east_sites(self) -> Sites | None:
        sites = self._modules.get("east_activations")
        return sites if isinstance(sites, Sites) else None

    def forward(self, *args, **kwargs):
        for each in self.east_order:
            each.restart()
        sites = self._east_sites
        if sites is None or sites[0].phase == OFF:
            return super().forward(*args, **kwargs)
        with _Redirect(sites):
            return super().forward(*args, **kwargs)

    @classmethod
    def east_members(cls, base: type) -> dict[str, Any]:
        """Methods of the model's author, such as `forward_features`, which somebody may call in place of forward."""
        methods: dict[str, Any] = {}
        for owner in base.__mro__:
            if not owner.__module__.startswith(("torch.", "east_plugins.")):
                for name, method in vars(owner).items():
                    if inspect.isfunction(method) and name != "forward" and not name.startswith("__"):
                        methods.setdefault(name, _entrance(method))
        return methods


def _entrance(method: Callable) -> Callable:
    """A method that sends ReLU calls to the module's sites, from the first on, where it is called on its own."""

    @functools.wraps(method)
    def entered(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not (sites := self._east_sites) or sites[0].phase == OFF:
            return method(self, *args, **kwargs)
        if id(sites) in _running.redirected:
            return method(self, *args, **kwargs)
        for each in self.east_order:
            each.restart()
        with _Redirect(sites):
            return method(self, *args, **kwargs)

    return entered


class _Redirect(TorchFunctionMode):
    """Sends ReLU calls to `sites`, in turn."""

    def __init__(self, sites: Sites):
        super().__init__()
        self.sites = sites

    def __enter__(self):
        if not torch.compiler.is_compiling():
            _running.redirected.append(id(self.sites))
        return super().__enter__()

    def __exit__(self, *error):
        if not torch.compiler.is_compiling():
            _running.redirected.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = None if _running.inside else Activation.of(func, args, kwargs, self.sites.replaces)
        if call is None or call.x.dim() < 2:
            return func(*args, **kwargs)
        with _inside(call.x):
            return self.sites.next()(*call)


class _Running(threading.local):
    inside = False  # an activation of this thread is running on a tensor-like

    def __init__(self) -> None:
        self.redirected: list[int] = []  # ids of the `Sites` whose modules run, innermost last
        self.calls: dict[int, int] = {}  # ReLU calls in this thread's forward pass, by the id of the `Sites`


_running = _Running()


@contextlib.contextmanager
def _inside(x) -> Iterator[None]:
    """ReLUs inside an activation are no calls of an enclosing module. Tensor-likes (the sparse engine's) need their
    own torch functions; tensors do without, which costs nothing."""
    if isinstance(x, Tensor):
        with torch._C.DisableTorchFunction():
            yield
        return
    _running.inside = True
    try:
        yield
    finally:
        _running.inside = False


class PhasedActivations:
    """The activations attached to a model: made by `attach`, or by `PhasedActivations(copy)` for a copy of one.

    As a host's plugin (`Masking(..., plugins=[phased])`) it is called after every step: it sets beta for the next
    step, and at the end of the phase-out removes itself from model and optimizer.

    Attributes:
        sites: the modules that stand in for a ReLU call; empty after `remove`.
        beta: the share last set.
    """

    def __init__(self, model: nn.Module, phase_out: PhaseOut | None = None):
        self.model = model
        self.phase_out = phase_out
        self.sites = _sites(model)
        self.beta = float(self.sites[0].beta) if self.sites else 0.0

    @property
    def phase(self) -> str:
        """ "full", "blend" or "off": which operations the sites do."""
        return self.sites[0].phase if self.sites else OFF

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for site in self.sites for parameter in site.parameters()]

    def join(self, optimizer: Optimizer) -> None:
        """Add the parameters to an optimizer made before `attach`; raises as `param_groups.join`."""
        param_groups.join(optimizer, self.model, self.parameters())

    def set_beta(self, beta: float) -> None:
        """Share of the activation in the blend, in [0, 1]; at 0 the model computes with its own ReLUs.

        Raises `UsageError` out of range.
        """
        if not 0 <= beta <= 1:
            raise UsageError(f"beta must be in [0, 1], got {beta}")
        phase = self.sites[0]._phase(beta) if self.sites else OFF
        moved = [site.beta for site in self.sites if phase == BLEND or phase != site.phase]
        if moved:  # two operations for all sites
            torch._foreach_zero_(moved)
            torch._foreach_add_(moved, beta)
        for site in self.sites:
            site.phase = phase
        self.beta = beta

    def remove(self, optimizer: Optimizer | None = None) -> None:
        """Leave the plain ReLU network: parameters are gone from model, state dict, optimizer and its state.

        Does nothing where they are removed already. A DistributedDataParallel around the model still expects the
        parameters: make it with `find_unused_parameters=True`, or make it anew.
        """
        if optimizer is not None:
            param_groups.leave(optimizer, self.parameters())
        for module in list(self.model.modules()):
            if isinstance(module, _Phased):
                restore(module, _Phased)
                module._modules.pop("east_activations", None)
                module.__dict__.pop("east_order", None)
        self.sites, self.beta = [], 0.0

    def __call__(self, host) -> None:
        """Bring the phase-out to `host.steps`, and at its end remove the parameters from `host.optimizer`."""
        if not self.sites or self.phase_out is None:
            return
        beta = self.phase_out.beta(host.steps)
        if beta == 0:
            self.remove(host.optimizer)
            return
        before = self.phase
        self.set_beta(beta)
        if before == OFF != self.phase:
            param_groups.begin(host.optimizer, self.parameters())


def attach(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    input_shape: Sequence[int],
    *,
    phase_out: PhaseOut | None = None,
    generator: torch.Generator | None = None,
    blend: str = "outputs",
    late: bool = False,
    replaces: Sequence[str] = ("relu",),
) -> PhasedActivations:
    """Put `factory(num_channels)` in place of every ReLU call of `model`, at beta 1.

    A call is a ReLU of a tensor of two or more dimensions. Its channels are along the axis that the layer or norm
    before it wrote them to, the second where none did. Calls are told apart by the
    module that makes them and their number within a forward pass, so that one nn.ReLU used three times in a block
    gets three activations. They are found in a forward pass in training mode that leaves parameters, buffers and
    random state as they were.

    Args:
        model: the network itself, not yet wrapped by DistributedDataParallel or torch.compile.
        factory: makes the module that stands in for a ReLU; its output has its input's shape.
        input_shape: shape of one input without the batch, for example (3, 32, 32).
        phase_out: beta over steps, where the result is to be a host's plugin.
        blend: "outputs", or "coefficients": those of DyReLU with (1, 0, 0, 0) of ReLU, before the maximum is taken,
            as in the authors' code (ES2, `sparselearning/dyrelu.py`).
        late: plain ReLU while beta is 1, as in the newest version of that code (26bd28e).
        replaces: the activations whose calls are meant, of relu, relu6, gelu, silu and hardswish; each is blended with,
            and ends as, what it is in the model.
        generator: CPU generator that the initial values depend on; by default they depend on the global random
            state. That state is never advanced.

    Raises `UsageError` where the model has phased activations already, and for other `replaces`, or such as have no
    coefficients; `NothingMatchedError` where it calls none of them; the model is unchanged then.
    """
    if unknown := set(replaces) - set(FUNCTIONS) or not replaces:
        raise UsageError(f"`replaces` must be some of {', '.join(FUNCTIONS)}, got {unknown or 'none'}")
    if blend == "coefficients" and set(replaces) != {"relu"}:
        raise UsageError("`blend` coefficients is for ReLU alone: `replaces` must be relu, or `blend` outputs")
    if _sites(model):
        raise UsageError("the model has phased activations (`east_dyrelu`) already")
    like = next(model.parameters(), torch.empty(0))
    with forked_rng(like.device):
        calls = calls_of(model, torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device), replaces)
        if not calls:
            raise NothingMatchedError(_nothing(model, like, input_shape, replaces))
        if generator is not None:
            torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        inside = blend == "coefficients"
        order = {
            owner: Sites(
                (PhasedActivation(factory(call.channels), call.axis, inside, late) for call in found), replaces
            )
            for owner, found in calls.items()
        }
        first: Any = next(iter(order.values()))[0].act
        if inside and "beta" not in inspect.signature(first.forward).parameters:
            raise UsageError(f"`blend` coefficients: {type(first).__name__} has none that could be; allowed is outputs")
    for owner, sites in order.items():
        swap(owner, _Phased)
        owner.east_activations = sites.to(like.device, like.dtype).train(owner.training)
    if model not in order:
        swap(model, _Phased)
    model.__dict__["east_order"] = list(order.values())
    return PhasedActivations(model, phase_out)


def _sites(model: nn.Module) -> list[PhasedActivation]:
    return [module for module in model.modules() if isinstance(module, PhasedActivation)]


def _nothing(model: nn.Module, like: Tensor, input_shape: Sequence[int], replaces: Sequence[str]) -> str:
    """What a model calls that has none of the activations that were asked for."""
    x = torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device)
    others = [name for name in FUNCTIONS if name not in replaces and calls_of(model, x, (name,))]
    if others:
        found = f"no {' or '.join(replaces)}, but {' and '.join(others)}"
        return f"`east_dyrelu`: the model calls {found}; see `east_dyrelu_replaces`"
    if tuple(replaces) == ("relu",):
        return "`east_dyrelu`: the model calls no ReLU (nn.ReLU, F.relu, torch.relu or Tensor.relu)"
    return f"`east_dyrelu`: the model calls none of {', '.join(replaces)}"
