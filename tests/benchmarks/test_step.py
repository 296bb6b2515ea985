"""A whole training step on two CPU cores, batch 128, against the same step under dense masking."""

import pytest
import torch

from east_plugins.measure.networks import MASKS, Subject
from east_plugins.measure.step import step

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "model, density, times",
    [
        ("resnet34", 0.001, 2.5), ("resnet34", 0.0005, 5), ("resnet34", 0.0001, 15),
        ("resnet50", 0.001, 2), ("resnet50", 0.0005, 4), ("resnet50", 0.0001, 10),
    ],
)  # fmt: skip
def test_times_faster_than_dense_masking(model, density, times, masks):
    torch.set_num_threads(2)
    result = step(Subject(model, 10, density, masks), batch_size=128, repeats=1)
    if masks != "ERK":  # nearly dead, so they prove little
        assert result["ratios"]["dense_over_sparse"] >= times
    assert result["ratios"]["dense_over_auto"] >= 0.97
