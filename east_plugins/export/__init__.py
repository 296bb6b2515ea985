"""The sparse network as a deployable file: exact, small and fast."""

from .c import CFile
from .formats import load_sparse, to_c, to_onnx
from .interface import Interface
from .safetensors import to_safetensors
from .verify import DisagreementError, run_c, run_onnx, verify

__all__ = [
    "CFile",
    "DisagreementError",
    "Interface",
    "load_sparse",
    "run_c",
    "run_onnx",
    "to_c",
    "to_onnx",
    "to_safetensors",
    "verify",
]
