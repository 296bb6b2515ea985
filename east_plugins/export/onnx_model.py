"""ONNX files: how they are put together and run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..errors import MissingExtraError
from .node import Pair

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

    def constant(self, values: np.ndarray | Sequence | float) -> str:
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

    def map(self, function: str, x: str) -> str:
        """Add a function of every number, by the name that a graph's `map` has."""
        if function in ("silu", "gelu", "gelu_tanh"):
            return self.op("Mul", x, self._gate(function, x))
        if function == "relu6":
            return self.op("Clip", x, self.constant(0.0), self.constant(6.0))
        if function == "rsqrt":
            return self.op("Reciprocal", self.op("Sqrt", x))
        if function == "hardsigmoid":
            return self.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        return self.op(ONNX_NAMES[function], x)

    def _gate(self, function: str, x: str) -> str:
        """What x is multiplied with."""
        number = self.constant
        if function == "silu":
            return self.op("Sigmoid", x)
        if function == "gelu":
            bell = self.op("Erf", self.op("Mul", x, number(math.sqrt(0.5))))
        else:
            cube = self.op("Mul", self.op("Mul", x, x), self.op("Mul", x, number(0.044715)))
            bell = self.op("Tanh", self.op("Mul", self.op("Add", x, cube), number(math.sqrt(2 / math.pi))))
        return self.op("Add", self.op("Mul", bell, number(0.5)), number(0.5))

    def reshape(self, x: str, *shape: int) -> str:
        """Another shape behind the batch."""
        return self.op("Reshape", x, self.constant([0, *shape]))

    def gather(self, x: str, places: Sequence[int]) -> str:
        """What lies at these places of the axis behind the batch."""
        return self.op("Gather", x, self.constant(np.asarray(places)), axis=1)

    def expanded(self, values: np.ndarray) -> str:
        """A constant, once for each of the batch."""
        shape = self.op("Concat", self.op("Shape", "input", start=0, end=1), self.constant(values.shape), axis=0)
        return self.op("Expand", self.constant(values[None]), shape)


#: ONNX's names of functions of one number.
ONNX_NAMES = {
    "sigmoid": "Sigmoid",
    "hardswish": "HardSwish",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "reciprocal": "Reciprocal",
}
