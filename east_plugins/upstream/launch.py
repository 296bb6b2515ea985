"""`run`: an existing script as `__main__`, with EAST attached to the host that it builds.

Nothing of the script is edited. Four entrances are used, and only where an `--east-*` flag is given: the optimizer's
constructor (by then the script's host classes are imported), the constructors of those classes, the first call of
the model in training mode (by then everything is built, and the shape of an input is known), and `parse_args`, which
records the flags in the script's namespace.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import functools
import importlib.abc
import importlib.util
import inspect
import itertools
import logging
import math
import os
import runpy
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import upstream as adapters
from ..errors import UsageError
from ..host import itop
from ..host.masking import Masking, unwrap
from ..ops.files import save_checkpoint
from ..options import east, flags
from ..options.flags import option
from ..plugins import activation as activations
from . import shims
from .adapter import Driven
from .length import observe

logger = logging.getLogger(__name__)

HOST_NAMES = ("Masking", "RigLScheduler")
HELP = """Runs SCRIPT as `python SCRIPT` would (with --module as `python -m`): its own arguments, folder and exit code.
EAST is attached to the host of masks that it builds. Without --east-* flags its results are those of plain python."""


@dataclass(frozen=True)
class RunOptions:
    """What `run` needs to know beside the tricks."""

    host: str = option(
        "script", "who owns the masks: the host that the script builds, or in its place the Masking of east_plugins "
        "with the same settings", choices=["script", "own"],
    )  # fmt: skip
    epochs: float | None = option(
        None, "epochs of the run (default: read off the decay of the prune rate, else the script's own --epochs)",
        type=float,
    )  # fmt: skip
    steps_per_epoch: int | None = option(
        None, "steps of an epoch (default: those of the script's longest shuffled DataLoader)", type=int
    )
    state: str | None = option(
        None, "file to save the last masks, fired weights and step to; torch.load reads it", metavar="FILE"
    )

    def __post_init__(self):
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UsageError(f"--east-epochs must be over 0, got {self.epochs:g}")
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise UsageError(f"--east-steps-per-epoch must be at least 1, got {self.steps_per_epoch}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the `--east-*` flags to a script's parser; ones that are not given leave no trace in its namespace."""
    east.add_flags(parser)
    flags.add_flags(parser.add_argument_group("attaching to a script"), RunOptions, prefix="east_")


def activate(args: argparse.Namespace) -> None:
    """For a script that has `add_flags` in its source: attach EAST to the host it builds from here on.

    Does nothing where none of the flags is given, or under `run`, which has attached EAST already. Exits with 2 and
    one line for flags that cannot be.
    """
    given = {name: value for name, value in vars(args).items() if name.split("_")[0] == "east"}
    if not given:
        return
    try:
        activation = Activation(given)
    except UsageError as error:
        sys.exit(_fail(error))
    activation.namespace = args
    activation.install()
    atexit.register(activation.close)


def main(argv: Sequence[str]) -> int:
    """The command `run`; the exit code is the script's."""
    parser = flags.Parser(
        prog="python -m east_plugins run",
        usage="%(prog)s [--module] SCRIPT [its arguments] [--east-* flags]",
        description=HELP,
        add_help=False,
    )
    add_flags(parser)
    shims.add_flags(parser)
    mine, rest = split(argv, parser)
    given = vars(parser.parse_args(mine))
    if rest[:1] in (["-h"], ["--help"]):
        print(parser.format_help())
        return 0
    by_name = rest[:1] in (["-m"], ["--module"])
    script, arguments = (rest[1:2], rest[2:]) if by_name else (rest[:1], rest[1:])
    if not script or script[0].startswith("-"):
        raise UsageError("run needs a SCRIPT, or --module and a module's name, before the script's own arguments")
    with contextlib.ExitStack() as stack:
        folder = _enter_script(stack, script[0], arguments, by_name)
        stack.enter_context(_lend_host())
        stack.enter_context(shims.installed(given.pop("east_compat", None), folder))
        activation = Activation(given, ours=frozenset(sys.modules) - {"__main__"}) if given else None
        if activation:
            stack.enter_context(_replaced(sys.modules[__name__], "activate", lambda args: None))  # of a patched script
            stack.callback(activation.uninstall)
            activation.install()
        try:
            if by_name:
                runpy.run_module(script[0], run_name="__main__", alter_sys=True)
            else:
                _run_script(script[0])
        except KeyboardInterrupt:
            if activation:
                activation.close()
            raise
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            if {"-h", "--help"} & set(arguments):
                print("\n" + "".join(parser.format_help().partition("EAST (")[1:]))
                raise
        if activation:
            activation.close()
            activation.check_used(script[0])
    return 0


def split(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The `--east-*` flags with their values, and everything else in its order.

    Raises `UsageError` for `--east-compat NAME`, whose name would be handed to the script.
    """
    mine, rest = [], []
    for flag, word in itertools.pairwise(itertools.takewhile("--".__ne__, argv)):
        if flag == "--east-compat" and shims.SHIMS.keys() >= set(word.split(",")):
            raise UsageError(
                f"--east-compat {word}: write --east-compat={word}, or where {word} is an argument of the script's, "
                "put it before --east-compat"
            )
    tokens = iter(argv)
    for token in tokens:
        name = token.partition("=")[0]
        if token == "--":
            rest += [token, *tokens]
        elif name.replace("_", "-") != "--east" and not name.replace("_", "-").startswith("--east-"):
            rest.append(token)
        else:
            mine.append(token)
            action = parser._option_string_actions.get(name)
            if action is not None and action.nargs is None and token == name:
                mine += [value for value in [next(tokens, None)] if value is not None]
    return mine, rest


def _fail(error: Exception) -> int:
    print(f"east_plugins: {error}", file=sys.stderr)
    return 2


def _enter_script(stack: contextlib.ExitStack, script: str, arguments: Sequence[str], by_name: bool) -> Path:
    """`sys.argv` and `sys.path` as the script would have them under plain `python`; returns its folder."""
    folder = Path.cwd() if by_name else Path(script).resolve().parent
    if not by_name and not Path(script).is_file():
        raise UsageError(f"run: no such script: {script}")
    stack.callback(setattr, sys, "argv", sys.argv)
    stack.callback(setattr, sys, "path", sys.path[:])
    sys.argv = [script, *arguments]
    sys.path[0] = str(folder)
    return folder


def _run_script(script: str) -> None:
    """What `python SCRIPT` does; unlike under `runpy.run_path` the module stays `__main__`, so that pickling works."""
    path = os.path.abspath(script)
    module, before = types.ModuleType("__main__"), sys.modules["__main__"]
    module.__file__, module.__builtins__ = path, builtins
    sys.modules["__main__"] = module
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
    finally:
        sys.modules["__main__"] = before


class _Lender(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`sparselearning.core` with our host in it: upstream's is on no package index."""

    def find_spec(self, name, path=None, target=None):
        if name in ("sparselearning", "sparselearning.core"):
            return importlib.util.spec_from_loader(name, self, is_package=name == "sparselearning")

    def exec_module(self, module):
        if module.__name__ == "sparselearning.core":
            logger.warning("no `sparselearning` found: lending east_plugins' own host under that name")
            module.Masking = Masking
            module.CosineDecay, module.LinearDecay = itop.CosineDecay, itop.LinearDecay
            module.add_sparse_args = itop.add_sparse_args


@contextlib.contextmanager
def _lend_host() -> Iterator[None]:
    lender = _Lender()
    sys.meta_path.append(lender)  # the last to be asked
    try:
        yield
    finally:
        sys.meta_path.remove(lender)
        for name in ("sparselearning", "sparselearning.core"):
            if getattr(sys.modules.get(name), "__loader__", None) is lender:
                del sys.modules[name]


class Activation:
    """EAST in this process, attached to every host that is built while it is installed.

    `ours` names the modules that are not the script's: host classes in them are no sign of a script with a host.
    """

    def __init__(self, given: Mapping[str, Any], ours: frozenset[str] = frozenset()):
        self.ours = ours
        self.given = dict(given)
        self.options = east.from_flags(given)
        _check_activation(self.options)
        names = (field for field in RunOptions.__dataclass_fields__ if f"east_{field}" in given)
        self.run = RunOptions(**{name: given[f"east_{name}"] for name in names})
        self._state = None if self.run.state is None else _writable(self.run.state)
        self.namespace: Any = None
        self.attachments: list[adapters.Attachment] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._host_in_sight = False
        self._watched: set[type] = set()
        self._undo = contextlib.ExitStack()
        self._waiting = contextlib.ExitStack()

    # ------------------------------------------------------------------ entrances

    def install(self) -> None:
        """Open the entrances; messages go to stderr as well."""
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("east_plugins: %(message)s"))
        log = logging.getLogger(__package__)
        self._undo.callback(log.setLevel, log.level)
        self._undo.callback(log.removeHandler, handler)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        parse_args, make = argparse.ArgumentParser.parse_args, Optimizer.__init__

        @functools.wraps(parse_args)
        def recorded(*args, **kwargs):
            self.namespace = parse_args(*args, **kwargs)
            vars(self.namespace).update(self.given)
            return self.namespace

        @functools.wraps(make)
        def made(optimizer, *args, **kwargs):
            make(optimizer, *args, **kwargs)
            self._optimizers.append(weakref.ref(optimizer))
            self._find_hosts()
            self._wait_for_training()

        self._undo.enter_context(_replaced(argparse.ArgumentParser, "parse_args", recorded))
        self._undo.enter_context(_replaced(Optimizer, "__init__", made))

    def uninstall(self) -> None:
        self._waiting.close()
        self._undo.close()

    def close(self) -> None:
        """At the end of the run: write the state where it is asked for, and say what did not come to its end."""
        for attachment in self.attachments:
            if attachment.started and not attachment.finished:
                logger.warning("%s; check --east-epochs", attachment.shortfall())
        hosted = [attachment for attachment in self.attachments if attachment.started and attachment.adapter]
        if self._state and hosted:
            save_checkpoint(Path(self._state), hosted[-1].state_dict())

    def check_used(self, script: str) -> None:
        """Raise `UsageError` where the script is over and nothing was attached."""
        if not any(attachment.started for attachment in self.attachments):
            raise UsageError(f"{script} trained no model of a known host: the --east-* flags had nothing to act on")

    # ------------------------------------------------------------------ hosts

    def _find_hosts(self) -> None:
        for module_name, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", {})
            for cls in (names.get(name) for name in HOST_NAMES):
                if isinstance(cls, type):
                    self._host_in_sight |= not (module_name in self.ours or module_name.startswith("east_plugins"))
                    self._watch(cls)

    def _watch(self, cls: type) -> None:
        if cls in self._watched:
            return
        self._watched.add(cls)
        init, signature = cls.__init__, inspect.signature(cls.__init__)

        @functools.wraps(init)
        def built(host, *args, **kwargs):
            values = [*args, *kwargs.values()]
            if isinstance(host, Driven) or not any(isinstance(value, Optimizer) for value in values):
                return init(host, *args, **kwargs)  # a subclass's call, or somebody else's class of that name
            attachment = adapters.construct(host, init, signature.bind(host, *args, **kwargs), self.options)
            if any(other.started and other.optimizer is attachment.optimizer for other in self.attachments):
                raise UsageError("the host was built after training had begun: --east-* flags cannot act on it")
            self.attachments.append(attachment)
            self._host_in_sight = True

        def ours(cls, *args, **kwargs):
            given = signature.bind(None, *args, **kwargs)
            given.apply_defaults()
            return adapters.adapter_class(cls).own(dict(list(given.arguments.items())[1:]))

        self._undo.enter_context(_replaced(cls, "__init__", built))
        if self.run.host == "own" and not issubclass(cls, Masking):
            self._undo.enter_context(_replaced(cls, "__new__", ours, lambda cls, *args, **kwargs: object.__new__(cls)))

    # ------------------------------------------------------------------ the first training step

    def _wait_for_training(self) -> None:
        self._waiting.close()
        call = nn.Module.__call__

        @functools.wraps(call)
        def called(module, *args, **kwargs):
            if module.training and torch.is_grad_enabled():
                self._begin(unwrap(module), args)
            return call(module, *args, **kwargs)

        self._waiting.enter_context(_replaced(nn.Module, "__call__", called))

    def _begin(self, model: nn.Module, args: tuple) -> None:
        waiting = [a for a in self.attachments if not a.started and a.model is not None]
        attachment = next((a for a in waiting if a.model is model), None)
        if attachment is None and not waiting:
            attachment = self._without_host(model, args)
        if attachment is None:
            return
        self._waiting.close()
        shape = args[0].shape[1:] if len(args) == 1 and isinstance(args[0], Tensor) else None
        decay = attachment.adapter.rate_decay if attachment.adapter else None
        length = None
        if self.options.cyclic or self.options.dyrelu:
            run = self.run
            length = observe(attachment.optimizer, decay, self.namespace, run.epochs, run.steps_per_epoch)
        attachment.start(length, shape)

    def _without_host(self, model: nn.Module, args: tuple) -> adapters.Attachment | None:
        """EAST on a dense or static run: the model is the first called that holds all of an optimizer's parameters."""
        if not (len(args) == 1 and isinstance(args[0], Tensor)):
            return None
        inside = set(model.parameters())
        for optimizer in filter(None, (reference() for reference in self._optimizers)):
            held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            if held and held <= inside:
                break
        else:
            return None
        if not self._host_in_sight:
            raise UsageError(
                f"the script has no known host that --east-* flags could act on; known are {adapters.KNOWN}"
            )
        attachment = adapters.Attachment(self.options)
        attachment.model, attachment.optimizer = model, optimizer
        self.attachments.append(attachment)
        return attachment


def _check_activation(options: east.EastOptions) -> None:
    if not options.dyrelu or options.dyrelu_type.startswith("__main__:"):  # not there before the script runs
        return
    try:
        activations.factory(options.dyrelu_type, reduction=options.dyrelu_reduction)
    except UsageError as error:
        raise UsageError(f"--east-dyrelu-type: {error}") from error


def _writable(state: str) -> Path:
    """The file of `--east-state`, found again should the script change folders."""
    path = Path(state).absolute()
    if (
        path.is_dir()
        or not path.parent.is_dir()
        or not all(os.access(p, os.W_OK) for p in (path, path.parent) if p.exists())
    ):
        raise UsageError(f"--east-state {state!r} cannot be written; allowed is a file in a folder that exists")
    return path


@contextlib.contextmanager
def _replaced(owner: Any, name: str, new: Callable, old: Callable | None = None) -> Iterator[None]:
    """`owner.name` is `new` for a while, and its old self (or `old`) again afterwards."""
    old = old or getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)
