"""ResNet-34 for 32-pixel images and 10 classes, one thread, batch 1, against onnxruntime running it dense."""

from argparse import Namespace

import pytest
import torch

from east_plugins.measure import inference as bench
from east_plugins.measure import networks as subject

ARGS = Namespace(batch=[1], repeats=15, threads=1, seed=0)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("masks", ["connected", "trained"])
@pytest.mark.parametrize(
    "density, c, onnx, kilobytes", [(0.001, 10, 3, 600), (0.0005, 25, 5, 350), (0.0001, 60, 15, 120)]
)
def test_times_faster_and_size(masks, density, c, onnx, kilobytes):
    torch.set_num_threads(1)
    result = bench.inference(*subject.draw("resnet34", 10, density, masks), subject.SHAPE, ARGS)
    assert result["ratios"]["onnxruntime_dense_over_c"] >= c
    assert result["ratios"]["onnxruntime_dense_over_onnx"] >= onnx
    assert result["sizes"]["c_object"] <= 1000 * kilobytes
