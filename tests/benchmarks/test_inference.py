"""ResNet-34 for 32-pixel images and 10 classes, one thread, batch 1, against onnxruntime running it dense."""

import pytest
import torch

from east_plugins.measure.inference import inference
from east_plugins.measure.networks import Subject, for_inference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("masks", ["connected", "connected-trained"])
@pytest.mark.parametrize(
    "density, c, onnx, kilobytes", [(0.001, 10, 3, 600), (0.0005, 25, 5, 350), (0.0001, 60, 15, 120)]
)
def test_times_faster_and_size(masks, density, c, onnx, kilobytes):
    torch.set_num_threads(1)
    subject = Subject("resnet34", 10, density, masks)
    result = inference(*for_inference(subject), subject.shape, batches=[1], repeats=15)
    assert result["ratios"]["onnxruntime_dense_over_c"] >= c
    assert result["ratios"]["onnxruntime_dense_over_onnx"] >= onnx
    assert result["sizes"]["c_object"] <= 1000 * kilobytes
