"""Weights that a run begins with in place of drawn ones."""

from __future__ import annotations

import logging

from torch import nn

from ..errors import UsageError
from ..ops import checkpoints
from ..ops.maskable import layers

log = logging.getLogger(__name__)


def begin_from(model: nn.Module, source: str) -> None:
    """Load the weights that a run's folder or a file holds (`ops.checkpoints.weights`) into a model.

    A classifier, the last linear layer, of another number of classes stays as it was drawn. Raises `UsageError` where
    anything else does not fit.
    """
    state, own = checkpoints.weights(source), model.state_dict()
    head = next((name for name, layer in reversed(list(layers(model))) if isinstance(layer, nn.Linear)), None)
    mine = {f"{head}.weight", f"{head}.bias"}
    if any(name in state and state[name].shape != own[name].shape for name in mine & own.keys()):
        log.info("%s: the classifier %s is of other classes and begins anew", source, head)
        state = {name: value for name, value in state.items() if name not in mine} | {
            name: own[name] for name in mine & own.keys()
        }
    wrong = sorted(state.keys() ^ own.keys() | {n for n in state.keys() & own.keys() if state[n].shape != own[n].shape})
    if wrong:
        raise UsageError(
            f"`start` {source} is of another network: {len(wrong)} entries differ, the first is {wrong[0]}"
        )
    model.load_state_dict(state)
