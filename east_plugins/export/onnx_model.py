"""ONNX files: how they are put together and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..errors import MissingExtraError
from .graph import Pair

OPSET, IR_VERSION = 17, 8  # of 2022: older runtimes load it too


def import_onnx():
    """The modules onnx and onnxruntime; raises `MissingExtraError`."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'east_plugins[export]'") from error
    return onnx, onnxruntime


def session(content: bytes, threads: int = 1):
    """An onnxruntime session on the CPU."""
    _, onnxruntime = import_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class Model:
    """An ONNX graph in the making."""

    def __init__(self, prefix: str = ""):
        self.onnx, _ = import_onnx()
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes) -> str:
        """Add an operation; returns the name of its result."""
        name = name or f"{self.prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: np.ndarray | Sequence) -> str:
        """Add a constant; floating-point numbers become float32."""
        values = np.asarray(values)
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def content(
        self,
        inputs: Mapping[str, Sequence[int]],
        outputs: Mapping[str, Sequence[int]],
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """The file; shapes are given without the batch, which is free."""
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        values = [
            [helper.make_tensor_value_info(name, float32, ["batch", *shape]) for name, shape in named.items()]
            for named in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "network", *values, self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        model.producer_name, model.producer_version = "east_plugins", __version__
        helper.set_model_props(model, dict(metadata or {}))
        self.onnx.checker.check_model(model)
        return model.SerializeToString()

    def conv(
        self,
        name: str,
        weight: np.ndarray,
        stride: Pair,
        pads: Sequence[int],
        groups: int,
        bias: np.ndarray | None,
        dilation: Pair = (1, 1),
    ) -> str:
        """Add a convolution; `pads` are top, left, bottom, right."""
        inputs = [name, self.constant(weight), *([] if bias is None else [self.constant(bias)])]
        return self.op(
            "Conv", *inputs, kernel_shape=weight.shape[2:], strides=stride, pads=pads, group=groups, dilations=dilation
        )
