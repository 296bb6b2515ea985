"""Attaching EAST to whatever host a script builds: the `--east-*` flags in a process that is somebody else's.

Nothing of the script is edited. Four entrances are used, and only where an `--east-*` flag is given: the optimizer's
constructor (by then the script's host classes are imported), the constructors of those classes, the first call of
the model in training mode (by then everything is built, and the shape of an input is known), and `parse_args`, which
records the flags in the script's namespace. `runner` runs the script; forks with the flags in their source call
`add_flags` and `activate`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import inspect
import logging
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..host.masking import Masking
from ..ops.files import save_checkpoint
from ..ops.maskable import unwrap
from ..options import east, flags
from ..options.flags import option
from ..options.sources import spoken
from ..plugins import activation as activations
from . import hosts
from . import state as states
from .adapter import Driven
from .attachment import Attachment, construct
from .length import observe
from .replacing import replaced

logger = logging.getLogger(__name__)

#: Names of the classes that are looked at as hosts of masks.
HOST_NAMES = ("Masking", "RigLScheduler")


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
        None, "file to save the last masks, fired weights, step and values to, however the script ends; "
        "east_plugins.upstream.state reads it", metavar="FILE",
    )  # fmt: skip

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
        takeover = Takeover(given)
    except UsageError as error:
        print(f"east_plugins: {spoken(str(error))}", file=sys.stderr)
        sys.exit(2)
    takeover.namespace = args
    takeover.install()
    atexit.register(takeover.close_at_exit)


class Takeover:
    """EAST in this process, attached to every host that is built while it is installed.

    `ours` names the modules that are not the script's: host classes in them are no sign of a script with a host.
    """

    def __init__(self, given: Mapping[str, Any], ours: frozenset[str] = frozenset()):
        self.ours = ours
        self.given = dict(given)
        self.options = east.from_flags(given)
        _check_dyrelu_type(self.options)
        names = (field for field in RunOptions.__dataclass_fields__ if f"east_{field}" in given)
        self.run = RunOptions(**{name: given[f"east_{name}"] for name in names})
        self._state = None if self.run.state is None else _writable(self.run.state)
        self.namespace: Any = None
        self.attachments: list[Attachment] = []
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
        if self._state and threading.current_thread() is threading.main_thread():
            self._end_on_signals()
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

        self._undo.enter_context(replaced(argparse.ArgumentParser, "parse_args", recorded))
        self._undo.enter_context(replaced(Optimizer, "__init__", made))

    def uninstall(self) -> None:
        self._waiting.close()
        self._undo.close()

    def close(self, early: bool = False) -> None:
        """At the end of the run: write the state where it is asked for, and say what did not come to its end.

        `early` is an end by a signal or an exception. Raises `UsageError` where the state cannot be written; the
        file is then what it was before.
        """
        for attachment in self.attachments:
            if attachment.started and not attachment.finished:
                logger.warning("%s%s", attachment.shortfall(), "" if early else "; check --east-epochs")
        hosted = [attachment for attachment in self.attachments if attachment.started and attachment.adapter]
        if self._state and hosted:
            try:
                save_checkpoint(self._state, states.gather(hosted[-1]))
            except (OSError, RuntimeError) as error:  # torch.save says so of a full disk
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
                raise UsageError(f"--east-state {self._state} cannot be written: {reason}") from error

    def close_at_exit(self) -> None:
        """`close` where nobody is left to catch an exception."""
        try:
            self.close()
        except UsageError as error:
            print(f"east_plugins: {error}", file=sys.stderr)

    def _end_on_signals(self) -> None:
        """SIGTERM and SIGHUP end the script as `sys.exit` does, so that its state is written; only where they would
        kill the process, and not in its children."""
        process = os.getpid()

        def end(number: int, frame: Any) -> None:
            if os.getpid() == process:
                sys.exit(128 + number)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                self._undo.callback(signal.signal, number, signal.SIG_DFL)

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
        init: Any = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(init)

        @functools.wraps(init)
        def built(host, *args, **kwargs):
            values = [*args, *kwargs.values()]
            if isinstance(host, Driven) or not any(isinstance(value, Optimizer) for value in values):
                return init(host, *args, **kwargs)  # a subclass's call, or somebody else's class of that name
            attachment = construct(host, init, signature.bind(host, *args, **kwargs), self.options)
            if any(other.started and other.optimizer is attachment.optimizer for other in self.attachments):
                raise UsageError("the host was built after training had begun: --east-* flags cannot act on it")
            self.attachments.append(attachment)
            self._host_in_sight = True

        def own(cls, *args, **kwargs):
            given = signature.bind(None, *args, **kwargs)
            given.apply_defaults()
            return hosts.adapter_for(cls).own(dict(list(given.arguments.items())[1:]))

        self._undo.enter_context(replaced(cls, "__init__", built))
        if self.run.host == "own" and not issubclass(cls, Masking):
            self._undo.enter_context(replaced(cls, "__new__", own, lambda cls, *args, **kwargs: object.__new__(cls)))

    # ------------------------------------------------------------------ the first training step

    def _wait_for_training(self) -> None:
        self._waiting.close()
        call = nn.Module.__call__

        @functools.wraps(call)
        def called(module, *args, **kwargs):
            if module.training and torch.is_grad_enabled():
                self._begin(unwrap(module), args)
            return call(module, *args, **kwargs)

        self._waiting.enter_context(replaced(nn.Module, "__call__", called))

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
        length, run = None, self.run
        if attachment.optimizer and (self.options.cyclic or self.options.dyrelu):
            length = observe(attachment.optimizer, decay, self.namespace, run.epochs, run.steps_per_epoch)
        attachment.start(length, shape)

    def _without_host(self, model: nn.Module, args: tuple) -> Attachment | None:
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
                f"the script has no known host that --east-* flags could act on; known are {hosts.known()}"
            )
        attachment = Attachment(self.options)
        attachment.model, attachment.optimizer = model, optimizer
        self.attachments.append(attachment)
        return attachment


def _check_dyrelu_type(options: east.EastOptions) -> None:
    if not options.dyrelu or options.dyrelu_type.startswith("__main__:"):  # not there before the script runs
        return
    try:
        activations.factory(options.dyrelu_type, reduction=options.dyrelu_reduction)
    except UsageError as error:
        raise UsageError(f"`east_dyrelu_type`: {error}") from error


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
