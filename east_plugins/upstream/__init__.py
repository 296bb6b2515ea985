"""EAST on hosts of other people: one adapter a host, one way to attach.

    attachment = attach(mask, EastOptions(cyclic=True), epochs=250, steps_per_epoch=352)

adds the tricks to a `Masking` of ITOP, sparse_learning or GraNet, a rigl-torch `RigLScheduler` or our own `Masking`
without editing its source. The host keeps its rules and its logging. `attachment.adapter` reads masks, fired weights
and step of any of them; `attachment.state_dict()` saves them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UsageError
from ..host.masking import Masking
from ..options.east import EastOptions
from .adapter import Adapter
from .attachment import Attachment
from .hosts.granet import GraNet
from .hosts.itop import ITOP
from .hosts.own import Own
from .hosts.rigl_torch import RigLTorch
from .hosts.sparse_learning import SparseLearning
from .length import Length

__all__ = ["HOSTS", "KNOWN", "Adapter", "Attachment", "Length", "adapter_class", "attach", "connect", "construct"]

HOSTS: tuple[type[Adapter], ...] = (ITOP, GraNet, SparseLearning, RigLTorch)
KNOWN = ", ".join(adapter.title for adapter in (*HOSTS, Own))


def adapter_class(host_class: type) -> type[Adapter]:
    """The adapter for a class of hosts, told by its constructor; raises `UsageError` for an unknown one."""
    if issubclass(host_class, Masking):
        return Own
    parameters = inspect.signature(host_class.__init__).parameters
    for adapter in HOSTS:
        if adapter.parameters <= parameters.keys():
            return adapter
    raise UsageError(
        f"{host_class.__module__}.{host_class.__qualname__}({', '.join(list(parameters)[1:])}) is a host of an unknown "
        f"version; known are {KNOWN}"
    )


def connect(host: Any, options: EastOptions) -> Attachment:
    """EAST on a host, not yet started: `Attachment.start` follows when the run's length is known."""
    return Attachment(options).connect(adapter_class(type(host))(host))


def construct(host: Any, init: Callable[..., None], given: inspect.BoundArguments, options: EastOptions) -> Attachment:
    """Run a host's constructor `init` with the arguments `given` (the host among them), and connect EAST to it."""
    kind = adapter_class(type(host))
    attachment = Attachment(options)
    kind.construct(attachment, init, given)
    return attachment.connect(kind(host)) if attachment.adapter is None else attachment


def attach(
    host: Any,
    options: EastOptions,
    *,
    epochs: float,
    steps_per_epoch: int,
    input_shape: Sequence[int] | None = None,
    first_drop: float | None = None,
) -> Attachment:
    """Add EAST to an existing host, before its `add_module` or (but for sharing) after it.

    Args:
        options: which tricks, and their numbers; what is None is scaled from the paper's to the run.
        epochs, steps_per_epoch: length of the run.
        input_shape: of one input without the batch, for `dyrelu`.
        first_drop: epoch of the first learning-rate drop, at which the activations are gone.

    Raises `UsageError` for an unknown host and whatever the tricks cannot do with the model.
    """
    attachment = connect(host, options)
    if models := [host.model] if hasattr(host, "W") else host.modules:
        if options.share:
            raise UsageError("--east-share ties weights before masks are made: attach to the host before add_module")
        attachment.model = models[0]
    attachment.start(Length(epochs, steps_per_epoch, first_drop), input_shape)
    return attachment
