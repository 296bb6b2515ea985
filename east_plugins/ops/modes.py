"""Modes, for a while: a model's training mode, PyTorch's random state and its function modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; afterwards every module is in its own again.

    `train()` is not called: some networks merge or freeze weights in theirs.
    """
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, random numbers are drawn on the CPU and on `device`; afterwards PyTorch's generators are as before."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def backward(output: Tensor, gradient: Tensor) -> None:
    """`torch.autograd.backward` that stays inside function modes, for what checkpoints compute again in it."""
    run = torch.autograd.Variable._execution_engine.run_backward
    run((output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
