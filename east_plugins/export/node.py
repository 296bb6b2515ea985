"""What a network computes, as a graph of tensor operations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Pair = tuple[int, int]
Shape = tuple[int, int, int]


@dataclass(eq=False)
class Node:
    """One operation; its result has `shape` (channels, height, width), lines height 1, vectors height and width 1.

    `op` is one of

    - input; constant (`weight` of `shape`)
    - conv (also linear; `weight` of shape out, in/groups, kh, kw), affine (`weight` and `bias`, a number a channel)
    - relu; map (`function` of every number); add and mul, of two inputs of the same shape
    - max_pool, avg_pool (the padding's zeros counted)
    - layer_norm (over the channels of each position), group_norm (over positions and channels of `groups` groups), both
      without factors; softmax and log_softmax over the channels of each of `groups` groups, at each position
    - pick (numbers of the input, by their places in it: `index` of `shape`), cat (channels of several inputs)
    - dot: channel c is the sum of products of the k-th channel of a group of the first input with the number of the
      second one at `index[c, k]`; there are `groups` groups, each for as many channels of the result
    """

    op: str
    name: str
    inputs: tuple[Node, ...]
    shape: Shape
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias: np.ndarray | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    function: str = ""
    eps: float = 0.0


@dataclass(frozen=True)
class Graph:
    """Operations in order of execution, the input first; shapes are those of the model, without the batch."""

    nodes: list[Node]
    output: Node
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
