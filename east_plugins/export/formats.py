"""Networks as files of each format, and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..errors import UsageError
from .c import CFile, write_c
from .compact import compact, too_dense
from .graph import trace
from .interface import Interface
from .onnx import write_onnx
from .onnx_dense import dense_onnx
from .safetensors import read_safetensors

logger = logging.getLogger(__name__)

LONG = 10_000  # steps an epoch, of files that do not say how many: all that a run can hold fits into them


def to_c(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    input_shape: Sequence[int],
    name: str = "network",
    about: Interface | None = None,
) -> CFile:
    """The network as a C99 file that defines `void NAME_run(const float *input, float *output)`.

    `masks` go by parameter name, weights without one are dense; `input_shape` leaves out the batch. With `about`, the
    file has the constants `NAME_mean`, `NAME_deviation` and `NAME_labels`, too. Raises `UsageError` for a layer that is
    not supported, a network that is not sparse, or a name that C does not allow.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UsageError(f"`name` {name!r} cannot begin a name in C: letters, digits and underscores are allowed")
    return write_c(compact(trace(model, masks, input_shape)), name, about.in_c(name) if about else "")


def to_onnx(
    model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int], about: Interface | None = None
) -> bytes:
    """The network as an ONNX file with input `input` and output `output`, for batches of any size.

    `about` becomes metadata of the file. What form a layer takes is measured with onnxruntime on this machine.
    A network that is not sparse is left dense, with a warning that names its layers. Raises as `to_c`, and
    `MissingExtraError`.
    """
    graph, metadata = trace(model, masks, input_shape), about.metadata() if about else None
    if reason := too_dense(graph):
        logger.warning("%s; the ONNX file is left dense", reason)
        return dense_onnx(graph, metadata)
    return write_onnx(compact(graph, chain=False), metadata)


def load_sparse(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of a file made by `to_safetensors`, bit for bit, in evaluation mode, and its masks.

    Without `model`, the network is built as the configuration that `export` puts into the file says; plugins that it
    names as `module:attribute` are imported only where they were given to `registry.trust` before. Raises `UsageError`
    where the file is missing, damaged, or of another network.
    """
    state, masks, network = read_safetensors(path)
    if model is None:
        from ..options import sources
        from ..plugins import registry
        from ..training import runs

        if "config" not in network:
            raise UsageError(f"{path} does not say which network it is of: pass the model to load_sparse")
        try:
            config = {str(key).replace("-", "_"): value for key, value in network["config"].items()}
            if "config" in config:
                raise UsageError(f"{path} names another file to read its settings from, which is not done")
            with registry.names_of_a_file():
                options = sources.from_flags(config).resolve(network.get("steps_per_epoch", LONG))
                model = runs.build_model(options, network["classes"], tuple(network["input_shape"]))
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UsageError(f"{path} is damaged: what it says of its network cannot be ({reason})") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path} is of another network: {' '.join(str(error).split())[:160]}") from error
    return model.eval(), masks
