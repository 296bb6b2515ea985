"""torchvision, imported where it is used."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from ..errors import MissingExtraError


def import_torchvision() -> ModuleType:
    """The `torchvision` module. Raises `MissingExtraError` where it is not installed.

    Where its compiled extension does not fit the installed torch (a CUDA wheel beside a CPU-only torch), the
    import fails with "operator torchvision::nms does not exist". Models, data sets and transforms do without
    it: the operators that the import looks for are declared, with no implementation, and it is tried again.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise MissingExtraError("torchvision is not installed: pip install torchvision") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    for operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
