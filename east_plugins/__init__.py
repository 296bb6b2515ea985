"""EAST's tricks for extreme sparsity as plugins for dynamic sparse training in PyTorch."""

from .errors import EastError, UsageError
from .itop import CosineDecay, LinearDecay, add_sparse_args
from .masking import Masking
from .registry import activation, allocation, density, growth, pruning, rate, redistribution, transform

__version__ = "0.1.0"

__all__ = [
    "CosineDecay",
    "EastError",
    "LinearDecay",
    "Masking",
    "UsageError",
    "activation",
    "add_sparse_args",
    "allocation",
    "density",
    "growth",
    "pruning",
    "rate",
    "redistribution",
    "transform",
]
