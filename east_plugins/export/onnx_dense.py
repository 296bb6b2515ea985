"""A network as an ONNX file with all its weights, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import Graph, Node
from .onnx_model import Model


def dense_onnx(graph: Graph, metadata: Mapping[str, str] | None = None) -> bytes:
    """The ONNX file of a network as it is, inactive weights included, for batches of any size."""
    model = Model()
    names: dict[Node, str] = {}
    for node in graph.nodes:
        names[node] = _add(model, node, [names[source] for source in node.inputs])
    model.op("Reshape", names[graph.output], model.constant([-1, *graph.output_shape]), name="output")
    return model.content({"input": graph.input_shape}, {"output": graph.output_shape}, metadata)


def _add(model: Model, node: Node, inputs: list[str]) -> str:
    pads = [*node.padding, *node.padding]
    window: dict[str, Any] = dict(kernel_shape=node.kernel, strides=node.stride)
    match node.op:
        case "input":
            return model.op("Reshape", "input", model.constant([-1, *node.shape]))
        case "conv":
            return model.conv(inputs[0], node.weight, node.stride, pads, node.groups, node.bias, node.dilation)
        case "affine":
            assert node.bias is not None
            unit = [model.constant(values) for values in (node.weight, node.bias, 0 * node.bias, 0 * node.bias + 1)]
            return model.op("BatchNormalization", inputs[0], *unit, epsilon=0.0)
        case "relu":
            return model.op("Relu", *inputs)
        case "add":
            return model.op("Add", *inputs)
        case "max_pool":
            over = [  # with ceil_mode the last windows hang over
                max(0, (n - 1) * s - p + (k - 1) * d + 1 - size)
                for n, s, p, k, d, size in zip(
                    node.shape[1:],
                    node.stride,
                    node.padding,
                    node.kernel,
                    node.dilation,
                    node.inputs[0].shape[1:],
                    strict=True,
                )
            ]
            return model.op("MaxPool", *inputs, **window, pads=[*node.padding, *over], dilations=node.dilation)
        case "avg_pool":
            if node.kernel == node.inputs[0].shape[1:]:
                return model.op("GlobalAveragePool", *inputs)
            return model.op("AveragePool", *inputs, **window, pads=pads, count_include_pad=1)
        case "flatten":
            return model.op("Reshape", inputs[0], model.constant([-1, *node.shape]))
        case "cat":
            return model.op("Concat", *inputs, axis=1)
    raise AssertionError(node.op)
