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
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .attachment import Attachment

logger = logging.getLogger(__name__)

MARK = "east_unfinished_at_step"

# Modules hold the number only: copies and pickles of a model do not drag the host along.
_numbers = itertools.count()
_attachments: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()


def watch(attachment: Attachment) -> Callable[[], None]:
    """Mark what is saved and copied of the attachment's model, until the function that is returned is called."""
    model = attachment.model
    model.east_attachment, model.east_unfinished = next(_numbers), True
    _attachments[model.east_attachment] = attachment
    model.register_load_state_dict_pre_hook(_keep_the_finished)
    hooks = [
        model.register_state_dict_post_hook(_mark),
        model.register_forward_hook(_answer_for_unfinished_copy, with_kwargs=True),
    ]

    def finish() -> None:
        model.east_unfinished = False
        for hook in hooks:
            hook.remove()

    return finish


def _mark(module: nn.Module, state_dict, prefix, local_metadata) -> None:
    if attachment := _attachments.get(module.east_attachment):
        state_dict[prefix + MARK] = torch.tensor(attachment.steps)


def _keep_the_finished(module: nn.Module, state_dict, prefix, *_) -> None:
    if prefix + MARK not in state_dict:
        return
    step = int(state_dict.pop(prefix + MARK))
    own = module.state_dict(prefix=prefix)
    if module.east_unfinished:  # a step back; activations that are gone stay gone
        for name in [name for name in state_dict if "east_activations." in name and name not in own]:
            del state_dict[name]
        return
    logger.warning("the checkpoint of step %d is of an unfinished network: the finished network is kept", step)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
    state_dict.update(own)


@torch.no_grad()
def _answer_for_unfinished_copy(module: nn.Module, args, kwargs, output):
    attachment = _attachments.get(module.east_attachment)
    if module.training or attachment is None or not attachment.finished:
        return None
    if any(parameter._version for parameter in module.parameters()):  # trained or averaged by the script since
        return None
    if not hasattr(module, "east_told"):
        module.east_told = True
        logger.warning("a copy of an unfinished network is tested: the finished network answers for it")
    model, training = attachment.model, attachment.model.training
    model.eval()
    try:
        return model(*args, **kwargs)
    finally:
        model.train(training)
