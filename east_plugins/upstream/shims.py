"""`--east-compat`: what scripts of some years ago need to start on a current stack. Off unless asked for.

Every shim names itself on stderr the first time it is used.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import pickle
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MissingExtraError, UnknownNameError
from .replacing import replaced
from .runner import Lender

_NUMPY = {
    "product": "prod", "cumproduct": "cumprod", "sometrue": "any", "alltrue": "all", "in1d": "isin", "round_": "round",
    "row_stack": "vstack", "trapz": "trapezoid", "Inf": "inf", "Infinity": "inf", "infty": "inf", "PINF": "inf",
    "NaN": "nan", "NAN": "nan", "float_": "float64", "complex_": "complex128", "unicode_": "str_", "string_": "bytes_",
}  # fmt: skip
_NUMPY_BUILTINS = {"float": float, "int": int, "bool": bool, "object": object, "str": str, "complex": complex}

_told: set[str] = set()


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("starting a script of some years ago").add_argument(
        "--east-compat", nargs="?", const=",".join(SHIMS), default=argparse.SUPPRESS, metavar="NAMES",
        help="supply what the script needs to start today, and say on stderr what of it was used. All of the "
        "following, or with --east-compat=NAME,NAME only these. "
        + "; ".join(f"{name}: {(shim.__doc__ or '').rstrip('.')}" for name, shim in SHIMS.items()),
    )  # fmt: skip


@contextlib.contextmanager
def installed(names: str | None, folder: Path) -> Iterator[None]:
    """The shims of these comma-separated names for a while, for a script in `folder`.

    Raises `UnknownNameError` for a name that is none.
    """
    with contextlib.ExitStack() as stack:
        for name in names.split(",") if names else ():
            if name not in SHIMS:
                raise UnknownNameError("shim in --east-compat", name, SHIMS)
            SHIMS[name](stack, folder)
        yield


def advice(error: BaseException, folder: Path, given: str | None) -> str | None:
    """One line that names the switch of `--east-compat` which supplies what a script in `folder` failed on; None where
    none does, or where it was `given` already."""
    name = _serving(error, folder)
    if name is None or name in (given or "").split(","):
        return None
    what = (SHIMS[name].__doc__ or "").rstrip(".")
    return f"east_plugins: --east-compat={name} supplies {what}; --east-compat alone supplies all that it can"


def _serving(error: BaseException, folder: Path) -> str | None:
    text = str(error)
    missing = error.name or "" if isinstance(error, ImportError) else ""
    if isinstance(error, (AttributeError, ImportError)):
        removed = re.search(r"'numpy' has no attribute '(\w+)'|`np\.(\w+)`|import name '(\w+)' from 'numpy'", text)
        if removed and {*removed.groups()} & {*_NUMPY, *_NUMPY_BUILTINS}:
            return "numpy"
    if missing == "torch._six":
        return "torch"
    package = missing.partition(".")[0]
    if package == "code" and _has_code(folder):
        return "code"
    if isinstance(error, ModuleNotFoundError) and package and _Above(folder).spec(package) is not None:
        return "path"
    if re.search("not compiled with CUDA|Found no NVIDIA driver|No CUDA GPUs", text):
        return "cuda"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in text:
        return "load"
    return "data" if _raised_in(error, "torchvision.datasets") else None


def _raised_in(error: BaseException, package: str) -> bool:
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name == package or name.startswith(f"{package}.") for name in frames)


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        print(f"east_plugins: --east-compat: {what}", file=sys.stderr)


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """`owner.name` is `make(its old self)` until the stack closes."""
    stack.enter_context(replaced(owner, name, make(getattr(owner, name))))


def _removed_numpy(stack: contextlib.ExitStack, folder: Path) -> None:
    """names that numpy has removed, such as np.product and np.float."""

    def make(getattr_before):
        def getattribute(name: str):
            if name in _NUMPY_BUILTINS:
                _tell(f"numpy.{name} is {name}")
                return _NUMPY_BUILTINS[name]
            if name in _NUMPY:
                _tell(f"numpy.{name} is numpy.{_NUMPY[name]}")
                return getattr(np, _NUMPY[name])
            return getattr_before(name)

        return getattribute

    _replace(stack, np, "__getattr__", make)


def _removed_torch(stack: contextlib.ExitStack, folder: Path) -> None:
    """the module torch._six, which torch has removed."""
    module = types.ModuleType("torch._six")
    contents = {
        "inf": float("inf"),
        "nan": float("nan"),
        "string_classes": (str, bytes),
        "int_classes": int,
        "container_abcs": collections.abc,
    }

    def getattribute(name: str):
        if name in contents:
            _tell(f"torch._six.{name}, which torch has removed")
            return contents[name]
        raise AttributeError(name)

    vars(module)["__getattr__"] = getattribute
    if "torch._six" not in sys.modules:
        sys.modules["torch._six"] = module
        stack.callback(sys.modules.pop, "torch._six", None)


def _cuda_without_cuda(stack: contextlib.ExitStack, folder: Path) -> None:
    """.cuda() that stays on the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        return

    def make(cuda):
        @functools.wraps(cuda)
        def stay(self, *args, **kwargs):
            _tell(".cuda() stays on the CPU: no CUDA here")
            return self

        return stay

    _replace(stack, torch.Tensor, "cuda", make)
    _replace(stack, torch.nn.Module, "cuda", make)


def _local_code(stack: contextlib.ExitStack, folder: Path) -> None:
    """the script's own package `code` in place of the standard library's."""
    ours = sys.modules.get("code")
    if ours is None or not _has_code(folder):
        return
    _tell(f"`code` is the package in {folder}")
    del sys.modules["code"]

    def restore():
        for name in [name for name in sys.modules if name.partition(".")[0] == "code"]:
            del sys.modules[name]
        sys.modules["code"] = ours

    stack.callback(restore)


def _has_code(folder: Path) -> bool:
    return (folder / "code").is_dir() or (folder / "code.py").is_file()


def _trusted_load(stack: contextlib.ExitStack, folder: Path) -> None:
    """torch.load of pickled objects, from files under the script's or the working folder only."""

    def make(load):
        @functools.wraps(load)
        def trusting(file, *args, **kwargs):
            if "weights_only" not in kwargs and isinstance(file, (str, os.PathLike)):
                path = Path(file).resolve()
                if any(path.is_relative_to(root) for root in (folder, Path.cwd())) and not _weights_only(load, path):
                    _tell(f"torch.load(weights_only=False) of {path}")
                    kwargs["weights_only"] = False
            return load(file, *args, **kwargs)

        return trusting

    _replace(stack, torch, "load", make)


def _weights_only(load: Callable, path: Path) -> bool:
    try:
        load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        return False
    except Exception:  # whatever else is wrong with it: the script's own call says it
        return True
    return True


def _own_data(stack: contextlib.ExitStack, folder: Path) -> None:
    """torchvision data sets from local files whose md5 sums are not the official ones."""
    from ..ops.vision import import_torchvision

    try:
        import_torchvision()
    except MissingExtraError:
        return
    import torchvision.datasets

    if not torchvision.extension._has_ops():
        _tell("torchvision without its compiled operators, which do not fit this torch")

    def make(check):
        @functools.wraps(check)
        def exists(path, md5=None):
            there = os.path.isfile(path)
            if there and not check(path, md5):
                _tell("local data files are taken as they are, whatever their md5 sum")
            return there

        return exists

    for name, module in list(sys.modules.items()):
        if name.startswith("torchvision.datasets.") and hasattr(module, "check_integrity"):
            _replace(stack, module, "check_integrity", make)


class _Above(importlib.abc.MetaPathFinder):
    """Finds packages beside the script's folder or above it, up to the checkout's root."""

    def __init__(self, folder: Path):
        root = next((p for p in (folder, *folder.parents) if (p / ".git").exists() or (p / "setup.py").exists()), None)
        above = [parent for parent in folder.parents if root and parent.is_relative_to(root)]
        self.folders = [str(parent) for parent in above]

    def spec(self, name: str) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.PathFinder.find_spec(name, self.folders)

    def find_spec(self, name, path=None, target=None):
        spec = self.spec(name) if path is None else None
        if spec is not None and spec.origin is not None:
            _tell(f"`{name}` is the one in {Path(spec.origin).parent}")
            return spec
        return None


def _packages_above(stack: contextlib.ExitStack, folder: Path) -> None:
    """packages in the root of a checkout, for a script in one of its folders."""
    finder = _Above(folder)
    place = next((i for i, f in enumerate(sys.meta_path) if isinstance(f, Lender)), len(sys.meta_path))
    sys.meta_path.insert(place, finder)
    stack.callback(sys.meta_path.remove, finder)


SHIMS: dict[str, Callable[[contextlib.ExitStack, Path], None]] = {
    "numpy": _removed_numpy,
    "torch": _removed_torch,
    "cuda": _cuda_without_cuda,
    "code": _local_code,
    "load": _trusted_load,
    "data": _own_data,
    "path": _packages_above,
}
