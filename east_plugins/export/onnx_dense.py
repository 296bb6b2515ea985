"""A network as an ONNX file with all its weights, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .node import Graph, Node
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
        case "constant":
            return model.expanded(node.weight)
        case "map":
            return model.map(node.function, *inputs)
        case "mul":
            return model.op("Mul", *inputs)
        case "pick":
            size = math.prod(node.inputs[0].shape)
            flat = model.op("Pad", model.reshape(inputs[0], size), model.constant([0, 0, 0, 1]))
            places = np.where(node.index < 0, size, node.index).flatten()
            return model.reshape(model.gather(flat, places.tolist()), *node.shape)
        case "dot":
            return _dot(model, node, *inputs)
        case "layer_norm":
            return _norm(model, node, inputs[0], 2)
        case "group_norm":
            return _norm(model, node, inputs[0], 2, 3, 4)
        case "softmax" | "log_softmax":
            grouped = model.reshape(inputs[0], node.groups, node.shape[0] // node.groups, *node.shape[1:])
            kind = "Softmax" if node.op == "softmax" else "LogSoftmax"
            return model.reshape(model.op(kind, grouped, axis=2), *node.shape)
        case "cat":
            return model.op("Concat", *inputs, axis=1)
    raise AssertionError(node.op)


def _norm(model: Model, node: Node, x: str, *axes: int) -> str:
    """x less its mean, over the root of its variance, over axes of [batch, groups, channels, height, width]."""
    grouped = model.reshape(x, node.groups, node.shape[0] // node.groups, *node.shape[1:])
    centred = model.op("Sub", grouped, model.op("ReduceMean", grouped, axes=axes))
    variance = model.op("ReduceMean", model.op("Mul", centred, centred), axes=axes)
    root = model.op("Sqrt", model.op("Add", variance, model.constant(node.eps)))
    return model.reshape(model.op("Div", centred, root), *node.shape)


def _dot(model: Model, node: Node, first: str, second: str) -> str:
    channels, inner = node.index.shape
    positions = math.prod(node.shape[1:])
    flat = model.reshape(second, math.prod(node.inputs[1].shape))
    numbers = model.reshape(
        model.gather(flat, node.index.flatten().tolist()), node.groups, channels // node.groups, inner
    )
    planes = model.reshape(first, node.groups, inner, positions)
    return model.reshape(model.op("MatMul", numbers, planes), *node.shape)
