"""How alike two topologies are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Weights active in both of two sets of masks over those active in any, in [0, 1]; 1 where none is active.

    Raises `UsageError` where the masks are not of one network.
    """
    if {name: mask.shape for name, mask in a.items()} != {name: mask.shape for name, mask in b.items()}:
        raise UsageError("the masks are of different networks")
    both = sum(int((mask & b[name]).sum()) for name, mask in a.items())
    either = sum(int((mask | b[name]).sum()) for name, mask in a.items())
    return both / either if either else 1.0
