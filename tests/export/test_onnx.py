"""Both forms that a layer of the ONNX file can take, whichever this machine would measure to be faster."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins import export
from east_plugins.export import onnx as writer
from east_plugins.ops.maskable import maskable
from east_plugins.training import models


@pytest.fixture(params=["dense", "taps"])
def form(request, monkeypatch):
    """Every sum in one form, small ones too."""
    milliseconds = [0.0, 1.0] if request.param == "dense" else [1.0, 0.0]
    monkeypatch.setattr(writer, "BLOCK", 2)
    monkeypatch.setattr(writer._Writer, "milliseconds", lambda *_: milliseconds)
    return request.param


def sparse_resnet(randomise, density):
    model = models.build("resnet20", 10).eval()
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    return model, {name: torch.rand(w.shape, generator=generator) < density for name, w in maskable(model).items()}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_agrees_on_random_networks(form, draw_network, data):
    model, masks, shape = draw_network(data.draw)
    export.verify(export.run_onnx(export.to_onnx(model, masks, shape)), model, masks, torch.randn(4, *shape))


@pytest.mark.parametrize("density", [0.3, 0.03])
def test_agrees_on_a_residual_network(form, density, randomise):
    model, masks = sparse_resnet(randomise, density)
    content = export.to_onnx(model, masks, (3, 32, 32))
    export.verify(export.run_onnx(content), model, masks, torch.randn(4, 3, 32, 32))
    groups = {a.i for node in onnx.load_from_string(content).graph.node for a in node.attribute if a.name == "group"}
    assert (groups == {1}) == (form == "dense")


def test_loads_in_runtimes_of_2022_and_takes_any_batch(randomise):
    content = export.to_onnx(*sparse_resnet(randomise, 0.01), (3, 32, 32))
    model = onnx.load_from_string(content)
    assert model.ir_version == 8 and [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    run, x = export.run_onnx(content), np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    assert np.allclose(run(x), np.concatenate([run(x[i : i + 1]) for i in range(5)]), rtol=1e-4, atol=1e-4)


def test_dead_weights_take_no_room(randomise):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3)).eval()
    mask = torch.zeros(2, 64, 3, 3, dtype=torch.bool)
    mask[:, 5] = True
    sparse = export.to_onnx(model, {"4.weight": mask}, (3, 16, 16))
    assert len(sparse) < len(export.to_onnx(model, {}, (3, 16, 16))) / 3
