"""Weight sharing: in every stage one block lends its convolution weights to the blocks after it (EAST, Sec. 3.2)."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from ...errors import NothingMatchedError, UsageError
from ...ops import param_groups
from ...ops.marks import PluginModule
from ...ops.maskable import layers
from ...ops.swap import Swapped, restore, swap
from ..registry import transform
from .dct.layers import is_dct

logger = logging.getLogger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_SHORTCUTS = ("shortcut", "downsample", "skip")

#: Where the scales of borrowed weights start.
SCALES = {"one": torch.ones, "uniform": torch.rand}

Block = dict[str, _ConvNd]  # a block's convolutions that can be lent, by their name inside it


if TYPE_CHECKING:

    class _Convolution(_ConvNd):
        """What a borrower is mixed into."""

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

else:
    _Convolution = object


class _Borrower(Swapped, _Convolution):
    """Mixed into the class of a convolution whose `weight` is another's; `scale` is its own."""

    scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.scale, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and f"{prefix}scale" not in state_dict:
            logger.warning(
                "%sweight is not of a network that shares weights, and takes the place of the lent one: load a plain "
                "checkpoint before `share`",
                prefix,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@transform.register("share")
def share(model: nn.Module, start: int = 2, optimizer: Optimizer | None = None, scale: str = "one") -> dict[str, str]:
    """In every stage block `start` (from 1) lends its convolution weights to all equal blocks after it.

    The borrowing convolution's `weight` becomes the lender's parameter itself and is convolved with as
    `scale * weight`, `scale` being a learnable scalar of its own; biases, norms, linear layers and
    shortcuts stay each block's own. State dicts hold the weight under both names; copies and moves keep the tie.

    A stage is a run of neighbouring children of an nn.Sequential, nn.ModuleList or nn.ModuleDict that are of one
    class and contain convolutions. A new one starts where the output width changes, or where a block's
    convolutions differ from the one's before, the stage's first excepted. Blocks are equal when their convolutions
    have the same names, classes, shapes, strides, paddings, dilations and groups.

    Args:
        optimizer: one made before: the weights that are no longer used leave it, the scales join it.
        scale: where the scales start: "one", or "uniform", drawn from U(0, 1) as in the authors' code (ES2).

    Returns the name of the lending convolution for each borrowing one. Raises `NothingMatchedError` where there
    are no equal blocks, `UsageError` for `start` below 1, a model that shares already, or one with DCT layers.
    """
    if start < 1:
        raise UsageError(f"`start` must be at least 1, got {start}")
    if scale not in SCALES:
        raise UsageError(f"`scale` must be one of {', '.join(SCALES)}, got {scale!r}")
    modules = list(model.modules())
    if any(isinstance(module, _Borrower) for module in modules):
        raise UsageError("the model shares weights (`east_share`) already")
    if any(is_dct(module) for module in modules):
        raise UsageError(
            "`east_share` cannot be used on DCT layers (`dctps`): it is left out there to prevent conflicts with "
            "the DCT matrices (EAST paper, Sec. 4)"
        )
    pairs = _pairs(model, start)
    if not pairs:
        raise NothingMatchedError(
            f"`east_share` needs a stage with a block equal to its block {start} after it "
            f"(the same convolutions, neighbours of one class); the model has none"
        )
    names = {module: name for name, module in model.named_modules()}
    if optimizer is not None:
        param_groups.leave(
            optimizer, [weight for borrower, _ in pairs if (weight := borrower._parameters["weight"]) is not None]
        )
    for borrower, lender in pairs:
        borrower.weight = lender.weight
        borrower.scale = nn.Parameter(SCALES[scale](()).to(lender.weight))
        swap(borrower, _Borrower)
    if optimizer is not None:
        param_groups.join(optimizer, model, scales(model))
    return {names[borrower]: names[lender] for borrower, lender in pairs}


def unshare(model: nn.Module) -> None:
    """Give every borrowing convolution a plain weight of its own, `scale * weight`: the same function, plain
    layers, for export. Optimizers made before do not know the new weights."""
    for module in model.modules():
        if isinstance(module, _Borrower):
            restore(module, _Borrower)
            module.weight = nn.Parameter((module.weight * module.scale).detach())
            del module.scale


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The scalars of all borrowing convolutions."""
    return [module.scale for module in model.modules() if isinstance(module, _Borrower)]


@contextlib.contextmanager
def hidden_scales(model: nn.Module) -> Iterator[None]:
    """Inside, the scalars are no parameters of the model, for code that takes every parameter for a weight."""
    borrowers = [module for module in model.modules() if isinstance(module, _Borrower)]
    hidden = [module._parameters.pop("scale") for module in borrowers]
    try:
        yield
    finally:
        for module, scale in zip(borrowers, hidden, strict=True):
            module._parameters["scale"] = scale


def _pairs(model: nn.Module, start: int) -> list[tuple[_ConvNd, _ConvNd]]:
    """(borrowing, lending) convolutions. Inner containers come first; a convolution takes part once."""
    lenders: dict[_ConvNd, _ConvNd] = {}
    for container in _containers(model):
        for _, children in itertools.groupby(container.children(), key=type):
            blocks = [block for child in children if (block := _convolutions(child))]
            taken = lenders.keys() | set(lenders.values())
            for stage in _stages([block for block in blocks if taken.isdisjoint(block.values())]):
                for block in stage[start:]:
                    if _structure(block) == _structure(stage[start - 1]):
                        lenders.update(zip(block.values(), stage[start - 1].values(), strict=True))
    return list(lenders.items())


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """Containers in the module, innermost first, those of plugins left out."""
    if isinstance(module, PluginModule):
        return
    for child in module.children():
        yield from _containers(child)
    if isinstance(module, _CONTAINERS):
        yield module


def _convolutions(block: nn.Module) -> Block:
    return {
        name: module
        for name, module in layers(block)
        if name
        and isinstance(module, _ConvNd)
        and type(module).forward in FORWARDS
        and "weight" in module._parameters
        and not any(word in name.lower() for word in _SHORTCUTS)
    }


def _structure(block: Block) -> list[tuple]:
    return [
        (name, type(c), c.weight.shape, c.stride, c.padding, c.dilation, c.groups, c.padding_mode)
        for name, c in block.items()
    ]


def _width(block: Block) -> int:
    return list(block.values())[-1].out_channels


def _stages(blocks: list[Block]) -> list[list[Block]]:
    stages: list[list[Block]] = []
    for block in blocks:
        stage = stages[-1] if stages else []
        same_width = stage and _width(block) == _width(stage[-1])
        if same_width and (len(stage) == 1 or _structure(block) == _structure(stage[-1])):
            stage.append(block)
        else:
            stages.append([block])
    return stages


def scale_of(module: nn.Module) -> nn.Parameter | None:
    """The scalar that a borrowing convolution multiplies its weight by; None for any other layer."""
    return module.scale if isinstance(module, _Borrower) else None
