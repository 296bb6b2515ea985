"""Which weights of somebody's model a host masks: the matrices that are trained, as ITOP takes them."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import UsageError
from ..ops.marks import PluginModule
from ..ops.maskable import unwrap, walk

logger = logging.getLogger(__name__)

Exclude = str | nn.Module | type[nn.Module]

#: Matrices left dense in silence where they are no more than this share of all: tokens, position embeddings.
FEW = 0.01


@dataclass
class Chosen:
    """A weight to be masked.

    Attributes:
        blocks: matrices that lie in it one below the other, such as an LSTM's gates; each has a budget of its own.
        uses: layers that compute with it.
        plain: whether it is the weight of a convolution or linear layer, as which connectivity can follow it.
    """

    weight: nn.Parameter
    blocks: int = 1
    uses: int = 1
    plain: bool = True


def choose(
    module: nn.Module, exclude: Exclude | Iterable[Exclude] = ()
) -> tuple[dict[str, Chosen], dict[str, nn.Parameter]]:
    """The weights to mask, and the ones that are frozen and therefore left alone, each by its parameter's name.

    Masked are the weights of convolutions, linear and bilinear layers, embeddings, recurrent layers and attention, a
    tied one under its first name. Weights that are frozen (`requires_grad` False) are left as they are, and so is
    whatever `exclude` names: a parameter or module by its name or a pattern (`layer4.*`), a module, a class of modules.

    Raises `UsageError` for a layer that computes its weight in a way that a mask would not survive, and for an
    `exclude` that matches nothing.
    """
    model = unwrap(module)
    excluded = _excluded(model, [exclude] if isinstance(exclude, (str, nn.Module, type)) else list(exclude))
    chosen: dict[int, tuple[str, Chosen]] = {}
    frozen: dict[str, nn.Parameter] = {}
    left: dict[str, nn.Parameter] = {}
    for prefix, layer in walk(model):
        for name, blocks in _matrices(prefix, layer, excluded):
            weight = layer.get_parameter(name)
            full = f"{prefix}.{name}" if prefix else name
            if id(weight) in excluded:
                continue
            if not weight.requires_grad:
                frozen[full] = weight
            elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
                left[full] = weight  # its gradients are sparse tensors
            elif id(weight) in chosen:
                chosen[id(weight)][1].uses += 1
            else:
                chosen[id(weight)] = full, Chosen(weight, blocks, plain=_is_plain(layer) and name == "weight")
    if frozen:
        logger.info("%d frozen weights are left as they are", len(frozen))
    _tell_dense(model, chosen.keys() | excluded, left)
    return dict(chosen.values()), frozen


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, (_ConvNd, nn.Linear))


def _matrices(prefix: str, layer: nn.Module, excluded: set[int]) -> Iterator[tuple[str, int]]:
    """Names of the parameters of one layer that are masked, and how many blocks each has."""
    if isinstance(layer, (RNNBase, RNNCellBase)):
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() == 2:  # gates lie one below the other; a projection of the outputs has none
                yield name, len(parameter) // layer.hidden_size if name.startswith(("weight_ih", "weight_hh")) else 1
    elif isinstance(layer, nn.MultiheadAttention):  # its output projection is a linear layer of its own
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(layer, name) is not None:
                yield name, 3 if name == "in_proj_weight" else 1
    elif isinstance(layer, (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)):
        yield _weight_of(prefix, layer, excluded), 1


def _weight_of(prefix: str, layer: nn.Module, excluded: set[int]) -> str:
    """Name of the parameter whose zeros are the zeros of the layer's weight."""
    own = layer._parameters
    if hasattr(own.get("weight"), "device_mesh"):
        raise UsageError(
            f"layer {prefix} holds a part of its weight only (a DTensor, as FSDP2 and tensor parallelism make them), "
            "and a mask needs all of it: wrap the model in DistributedDataParallel instead"
        )
    if isinstance(own.get("weight"), UninitializedParameter):
        raise UsageError(f"layer {prefix} is lazy and has no weight yet: call the model once before add_module")
    if own.get("weight") is not None:
        return "weight"
    if parametrize.is_parametrized(layer, "weight"):
        steps = list(layer.parametrizations["weight"])  # type: ignore[index]
        if [type(step) for step in steps] == [_SpectralNorm]:
            return "parametrizations.weight.original"
        reason = f"is parametrized by {', '.join(type(step).__name__.strip('_') for step in steps)}"
    elif any(isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values()):
        return "weight_orig"
    elif "weight_g" in own:
        reason = "has weight norm, which divides by the norm of rows, 0 where no weight is active"
    elif "weight_orig" in own:
        reason = "is pruned by torch.nn.utils.prune (prune.remove it, and begin with sparse_init='resume')"
    else:
        reason = "has no parameter called weight"
    if all(id(parameter) in excluded or not parameter.requires_grad for parameter in layer.parameters()):
        return next(name for name, _ in layer.named_parameters())
    raise UsageError(
        f"layer {prefix} ({type(layer).__name__}) {reason}, so that its weight cannot be masked; "
        f"remove that, or leave it dense with add_module(..., exclude={prefix!r})"
    )


def _excluded(model: nn.Module, exclude: Sequence[Exclude]) -> set[int]:
    """Identities of the parameters that are to be left dense."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for each in exclude:
        if isinstance(each, str):
            inside = [modules[name] for name in fnmatch.filter(modules, each) if name or each == ""]
            hits = [parameters[name] for name in fnmatch.filter(parameters, each)]
        else:
            kind = each if isinstance(each, type) else None
            inside = [module for module in modules.values() if (isinstance(module, kind) if kind else module is each)]
            hits = []
        if not inside and not hits:
            known = difflib.get_close_matches(str(each), [*modules, *parameters], n=3)
            near = f"; did you mean {' or '.join(known)}?" if known else ""
            raise UsageError(f"exclude={each!r} matches no module and no parameter of the model{near}")
        hits += [parameter for module in inside for parameter in module.parameters()]
        found |= {id(parameter) for parameter in hits}
    return found


def _tell_dense(model: nn.Module, known: set[int], left: dict[str, nn.Parameter]) -> None:
    """One line on the matrices that stay dense because no layer of a known kind holds them."""
    plugins_own = {id(p) for m in model.modules() if isinstance(m, PluginModule) for p in m.parameters()}
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() > 1 and id(parameter) not in plugins_own
        and not isinstance(parameter, UninitializedParameter)
    }  # fmt: skip
    left = left | {name: parameter for name, parameter in trained.items() if id(parameter) not in known}
    size = sum(parameter.numel() for parameter in left.values())
    share = size / max(1, sum(parameter.numel() for parameter in trained.values()))
    if size:
        level = logging.WARNING if share > FEW else logging.INFO
        message = "%.1f %% of the matrix weights are left dense, in layers of no known kind: %s"
        logger.log(level, message, 100 * share, some_of(left))


def check_followed(what: str, chosen: Mapping[str, Chosen]) -> None:
    """Raise `UsageError` where connectivity cannot follow some of the weights; `what` wants it."""
    if others := [name for name, each in chosen.items() if not each.plain]:
        raise UsageError(
            f"{what} follows convolutions and linear layers only, and this model has {some_of(others)}: "
            "take ERK, ER, uniform, EPL or EPF, or leave these dense with add_module(..., exclude=)"
        )


def some_of(names: Collection[str]) -> str:
    """The first of many names."""
    names = list(names)
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
