"""Hosts inside other people's trainers: Lightning, Hugging Face's `Trainer`, Accelerate (see README.md)."""

from .saving import save_with_optimizer

__all__ = ["save_with_optimizer"]
