"""Training that pays for active weights only: sparse convolutions and norms over the channels that weights touch."""

from .engine import ENGINES, Engine

__all__ = ["ENGINES", "Engine"]
