"""ResNet-34 for 32-pixel images and 10 classes, one thread, batch 1, against onnxruntime running it dense."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from east_plugins import CosineDecay, Masking, models
from east_plugins.export import bench
from east_plugins.init.weights import sparse_fan_in
from east_plugins.ops.maskable import maskable

ARGS = Namespace(batch=[1], repeats=15, threads=1, seed=0)
SHAPE = (3, 32, 32)
STEPS = 24

pytestmark = pytest.mark.slow


def network(masks, density):
    """A network with masks drawn connected, or as RigL's updates leave them from an ERK or a connected start."""
    start, _, updated = masks.partition("+")
    torch.manual_seed(0)
    model = models.build("resnet34", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    host = Masking(
        optimizer, growth_mode="gradient", death_mode="magnitude", death_rate=0.5,
        death_rate_decay=CosineDecay(0.5, STEPS), redistribution_mode="none", update_frequency=2,
    )  # fmt: skip
    host.add_module(model, density, start, input_shape=SHAPE, weight_init="sparse-fan-in")
    for _ in range(STEPS if updated else 0):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, *SHAPE)), torch.randint(10, (8,))).backward()
        host.step()
    sparse_fan_in(maskable(model), host.masks, torch.Generator().manual_seed(0))  # so few steps leave wild values
    bench.randomise_norms(model, torch.Generator().manual_seed(0))
    return model.eval(), host.masks


@pytest.mark.parametrize("masks", ["connected", "connected+rigl", "ERK+rigl"])
@pytest.mark.parametrize(
    "density, c, onnx, kilobytes", [(0.001, 10, 3, 600), (0.0005, 25, 5, 350), (0.0001, 60, 15, 120)]
)
def test_times_faster_and_size(masks, density, c, onnx, kilobytes):
    torch.set_num_threads(1)
    result = bench.inference(*network(masks, density), SHAPE, ARGS)
    assert result["ratios"]["onnxruntime_dense_over_c"] >= c
    assert result["ratios"]["onnxruntime_dense_over_onnx"] >= onnx
    assert result["sizes"]["c_object"] <= 1000 * kilobytes
    print(masks, density, result["ratios"], result["sizes"])
