"""Only a finished network counts as the best: what was saved or copied before is not tested in its place.

Scripts save the state dict, or a deepcopy, of the epoch that validates best, and test that at the end. Such an epoch
may lie in the dense part of a cycle, or have DyReLU in it. A state dict of an unfinished network is therefore marked
by an entry of its own; loading it into the network once that is finished keeps the finished weights, and a copy
taken before lets the finished network answer for it. State dicts of the finished network are plain.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

logger = logging.getLogger(__name__)

MARK = "east_unfinished_at_step"


class Watched(Protocol):
    """Whose network it is: its step, and whether the network is at its target."""

    model: nn.Module | None
    finished: bool

    @property
    def steps(self) -> int: ...


# Modules hold the number only: copies and pickles of a model do not drag the host along.
_numbers = itertools.count()
_watched: weakref.WeakValueDictionary[int, Watched] = weakref.WeakValueDictionary()


def watch(model: nn.Module, watched: Watched) -> Callable[[], None]:
    """Mark what is saved and copied of `model` until the function that is returned is called."""
    number = next(_numbers)
    _watched[number] = watched
    vars(model).update(east_attachment=number, east_unfinished=True)
    model.register_load_state_dict_pre_hook(_keep_the_finished)
    hooks = [
        model.register_state_dict_post_hook(_mark),
        model.register_forward_hook(_answer_for_unfinished_copy, with_kwargs=True),
    ]

    def finish() -> None:
        vars(model)["east_unfinished"] = False
        for hook in hooks:
            hook.remove()

    return finish


def _mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if watched := _watched.get(vars(module)["east_attachment"]):
        state_dict[prefix + MARK] = torch.tensor(watched.steps)


def _keep_the_finished(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if prefix + MARK not in state_dict:
        return
    step = int(state_dict.pop(prefix + MARK))
    own = module.state_dict(prefix=prefix)
    if vars(module)["east_unfinished"]:  # a step back; activations that are gone stay gone
        for name in [name for name in state_dict if "east_activations." in name and name not in own]:
            del state_dict[name]
        return
    logger.warning("the checkpoint of step %d is of an unfinished network: the finished network is kept", step)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
    state_dict.update(own)


@torch.no_grad()
def _answer_for_unfinished_copy(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    watched = _watched.get(vars(module)["east_attachment"])
    if module.training or watched is None or watched.model is None or not watched.finished:
        return None
    if any(parameter._version for parameter in module.parameters()):  # trained or averaged by the script since
        return None
    if "east_told" not in vars(module):
        vars(module)["east_told"] = True
        logger.warning("a copy of an unfinished network is tested: the finished network answers for it")
    model, training = watched.model, watched.model.training
    model.eval()
    try:
        return model(*args, **kwargs)
    finally:
        model.train(training)
