"""A host as a method's name describes it, for the trainer and for scripts of one's own alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NothingMatchedError, UsageError
from ..ops import param_groups
from ..ops.maskable import unwrap
from ..options import plugged, sources
from ..options.config import Resolved
from ..plugins.activation import factory
from ..plugins.activation.phased import PhasedActivations, attach
from ..plugins.allocation.sample import Loss
from ..plugins.protocols import HostPlugin
from ..plugins.transform.quiet import quiet_scales, silence
from ..plugins.transform.sharing import share

if TYPE_CHECKING:
    from .masking import Masking


def of(
    kind: type[Masking],
    method: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    density: float | None = None,
    input_shape: Sequence[int] | None = None,
    epochs: int = 1,
    seed: int = 0,
    batches: Iterable[Sequence[Tensor]] | None = None,
    loss: Loss = F.cross_entropy,
    **settings: Any,
) -> Masking:
    """A host that trains `model` by a method of `train`, over an optimizer that is there already.

        mask = Masking.of("rigl+connected", model, optimizer, density=0.0005, steps=88_000, input_shape=(3, 32, 32))

    The method's tricks are applied to the model: weights are tied, activations put in place of its ReLUs, and the
    optimizer holds what is new in place of what is gone.

    Args:
        kind: class of the host.
        method: name of a method with `+trick`s, as `train --method` takes it.
        steps: optimizer steps of the whole run, which update frequencies and cycles are scaled to.
        density: active share of the maskable weights, in (0, 1]; None: 1 for `dense`, else 0.001.
        input_shape: of one input without the batch; for `connected` starts and DyReLU.
        epochs: parts of the run in which `lr_drops` and EAST's lengths are counted; 1 counts them as shares of it.
        seed: of everything random in the host.
        batches: pairs of training inputs and targets, such as a DataLoader, for methods that look at the data when
            they begin (`snip`, `grasp`, `force`, `iter_snip`) or end (`suptickets`, for batch norms).
        loss: `loss(output, target)`, the mean loss of a batch, for the same.
        settings: any other flag of `train` that concerns the method, such as `death_rate=0.3`,
            `east_cyclic_length=50` or `growth_tau=0.1`.

    Raises `UsageError` for what cannot be; model and optimizer are unchanged then.
    """
    if epochs < 1 or steps < epochs:
        raise UsageError(f"`steps` {steps} and `epochs` {epochs}: allowed is at least one step an epoch")
    asked = sources.from_flags({"method": method, "density": density, "epochs": epochs, "seed": seed, **settings})
    resolved = asked.resolve(steps // epochs)
    if resolved.dctps:
        raise UsageError("`dctps`: convert the model before its optimizer is made, with east_plugins.convert(model)")
    network = unwrap(model)
    scales = quiet_branches(resolved, network, input_shape)
    if resolved.east.share or resolved.east.dyrelu:
        param_groups.join(optimizer, network, [])  # raises here, before anything is changed
    phased = activations(resolved, network, input_shape) if resolved.east.dyrelu else None
    if resolved.east.share:
        try:
            share(network, resolved.east.share_from, optimizer, resolved.east.share_scale)
        except UsageError:
            if phased is not None:
                phased.remove()
            raise
    if phased is not None:
        phased.join(optimizer)
    silence(scales)
    plugins = [phased] if phased is not None else []
    return hosted(kind, resolved, model, optimizer, input_shape, plugins, batches, loss)


def hosted(
    kind: type[Masking],
    resolved: Resolved,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_shape: Sequence[int] | None,
    plugins: Sequence[HostPlugin] = (),
    batches: Iterable[Sequence[Tensor]] | None = None,
    loss: Loss = F.cross_entropy,
) -> Masking:
    """The host that resolved options describe, over a model and optimizer whose tricks are applied."""
    host = kind(
        optimizer,
        death_rate=resolved.death_rate,
        death_rate_decay=resolved.rate_decay(),
        death_mode=resolved.death,
        growth_mode=resolved.growth,
        redistribution_mode=resolved.redistribution,
        structure=resolved.structure,
        schedule=resolved.schedule(),
        prune_scope=resolved.prune_scope,
        prune_rounding=resolved.prune_rounding,
        keep_connected=resolved.keep_connected,
        seed=resolved.seed,
        plugins=[*plugins, *resolved.companions()],
        options={slot.kind: slot.values(resolved.plugin_options) for slot in plugged.SLOTS},
    )
    host.add_module(
        model,
        density=resolved.density,
        sparse_init=resolved.sparse_init,
        input_shape=input_shape,
        weight_init=resolved.weight_init,
        batches=batches,
        loss=loss,
    )
    return host


def quiet_branches(resolved: Resolved, model: nn.Module, input_shape: Sequence[int] | None) -> dict[str, nn.Parameter]:
    """The scales of norms that resolved options want to start at zero; none where a method would have them so and the
    model has no residual branches."""
    if not resolved.quiet_branches:
        return {}
    if input_shape is None:
        raise UsageError("`quiet_branches` needs `input_shape`, the shape of one input without the batch")
    try:
        return quiet_scales(model, input_shape, resolved.quiet_branches)
    except NothingMatchedError:
        if resolved.quiet_branches != resolved.preset.settings.get("quiet_branches"):
            raise
        return {}


def activations(resolved: Resolved, model: nn.Module, input_shape: Sequence[int] | None) -> PhasedActivations:
    """Put the activation of resolved options in place of the model's ReLUs; raises `UsageError` where the run ends
    before they are phased out."""
    tricks = resolved.east
    if input_shape is None:
        raise UsageError("`east_dyrelu` needs `input_shape`, the shape of one input without the batch")
    if tricks.dyrelu_end > resolved.epochs:
        raise UsageError(f"`east_dyrelu_end` {tricks.dyrelu_end:g} lies after the last of {resolved.epochs} epochs")
    make = factory(tricks.dyrelu_type, reduction=tricks.dyrelu_reduction, **resolved.options_of("east_dyrelu_type"))
    return attach(
        model,
        make,
        input_shape,
        phase_out=tricks.phase_out(resolved.steps_per_epoch),
        generator=torch.Generator().manual_seed(resolved.seed),
        blend=tricks.dyrelu_blend,
        late=tricks.dyrelu_late,
        replaces=tricks.dyrelu_replaced,
    )
