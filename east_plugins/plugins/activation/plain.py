"""Activation factories other than DyReLU, as compared in the EAST paper (Sec. 3.1)."""

from __future__ import annotations

from torch import nn

from ..registry import activation


@activation.register("prelu")
def prelu(num_channels: int) -> nn.PReLU:
    """A learnable negative slope for every channel (He et al. 2015)."""
    return nn.PReLU(num_channels)


@activation.register("swish")
def swish(num_channels: int) -> nn.SiLU:
    """x sigmoid(x) (Ramachandran et al. 2017)."""
    return nn.SiLU()


@activation.register("mish")
def mish(num_channels: int) -> nn.Mish:
    """x tanh(softplus(x)) (Misra 2019)."""
    return nn.Mish()
