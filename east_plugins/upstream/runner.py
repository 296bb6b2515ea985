"""Running a script as `__main__`, as plain `python` would, with a `sparselearning` lent where it has none."""

from __future__ import annotations

import builtins
import contextlib
import importlib.abc
import importlib.util
import logging
import os
import runpy
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UsageError
from ..host import itop
from ..host.masking import Masking

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def entered(script: str, arguments: Sequence[str], by_name: bool) -> Iterator[Path]:
    """`sys.argv` and `sys.path` as the script (`by_name`: the module) has them under plain `python`; gives its folder.

    Raises `UsageError` where there is no such script.
    """
    folder = Path.cwd() if by_name else Path(script).resolve().parent
    if not by_name and not Path(script).is_file():
        raise UsageError(f"run: no such script: {script}")
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(folder)
    if by_name and not _is_module(script):
        sys.argv, sys.path = argv, path
        raise UsageError(f"run: no such module: {script}")
    try:
        yield folder
    finally:
        sys.argv, sys.path = argv, path


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def run(script: str, by_name: bool) -> None:
    """What `python SCRIPT`, or `python -m MODULE`, does."""
    if by_name:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    # unlike under `runpy.run_path` the module stays `__main__`, so that pickling works
    path = os.path.abspath(script)
    module, before = types.ModuleType("__main__"), sys.modules["__main__"]
    vars(module).update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = module
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
    finally:
        sys.modules["__main__"] = before


class Lender(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`sparselearning.core` with our host in it: upstream's is on no package index."""

    def find_spec(self, name, path=None, target=None):
        if name in ("sparselearning", "sparselearning.core"):
            return importlib.util.spec_from_loader(name, self, is_package=name == "sparselearning")

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "sparselearning.core":
            logger.warning("no `sparselearning` found: lending east_plugins' own host under that name")
            names = ("CosineDecay", "LinearDecay", "add_sparse_args")
            vars(module).update({name: getattr(itop, name) for name in names}, Masking=Masking)


@contextlib.contextmanager
def lent_host() -> Iterator[None]:
    """`import sparselearning` finds our host where nobody else answers, for a while."""
    lender = Lender()
    sys.meta_path.append(lender)  # the last to be asked
    try:
        yield
    finally:
        sys.meta_path.remove(lender)
        for name in ("sparselearning", "sparselearning.core"):
            if getattr(sys.modules.get(name), "__loader__", None) is lender:
                del sys.modules[name]
