"""A host's state in the checkpoints of whatever saves its optimizer."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import UsageError
from ..host.masking import Masking
from ..plugins.activation.phased import PhasedActivations

#: Where the host's state lies in the optimizer's; PyTorch ignores what it does not know there.
KEY = "east_host"

#: The optimizers whose checkpoints have a host's state, by host.
_saving: weakref.WeakKeyDictionary[Masking, weakref.ref[Optimizer]] = weakref.WeakKeyDictionary()


def save_with_optimizer(host: Masking) -> None:
    """Have `host.optimizer.state_dict()` hold the host's state, and `load_state_dict` restore it.

    So it travels with every checkpoint that has the optimizer's: a trainer's, or `torch.save` in a loop of one's own.
    Activations in their phase are brought to the step that was saved; past its end they are removed. Call it after
    `add_module`, and again where the host gets another optimizer.

    Loading raises `UsageError` where the checkpoint was written without, or for another model; nothing is changed then.
    """
    host.state_dict()  # raises before add_module
    if host in _saving and _saving[host]() is host.optimizer:
        return
    _saving[host] = weakref.ref(host.optimizer)
    known = weakref.ref(host)

    def add(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        ours = known()
        return saved if ours is None or ours.optimizer is not optimizer else {**saved, KEY: ours.state_dict()}

    def take(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        ours = known()
        if ours is None or ours.optimizer is not optimizer:
            return saved
        if KEY not in saved:
            raise UsageError(
                "the optimizer's checkpoint has no host's state, so that its masks are not known; "
                "it was written without save_with_optimizer(mask)"
            )
        if not _is_at(ours, saved[KEY]):
            ours.load_state_dict(saved[KEY])
            for plugin in ours.plugins:
                if isinstance(plugin, PhasedActivations):
                    plugin(ours)
        return {name: value for name, value in saved.items() if name != KEY}

    for handle in (
        host.optimizer.register_state_dict_post_hook(add),
        host.optimizer.register_load_state_dict_pre_hook(take),
    ):
        weakref.finalize(host, handle.remove)


def _is_at(host: Masking, state: dict[str, Any]) -> bool:
    """Whether a host is where a state of its says. Accelerate loads an optimizer's own state back into it, at a time at
    which the model may hold a checkpoint's weights already: these masks, which are about to go, must not cut them."""
    saved = state.get("masks", {})
    same = state.get("steps") == host.steps and saved.keys() == host.masks.keys()
    return same and all(torch.equal(mask, saved[name].to(mask.device)) for name, mask in host.masks.items())
