"""Every export computes what PyTorch computes, over random small networks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins import export
from east_plugins.ops.maskable import maskable
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models

STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1")


def batches(shape):
    """Random inputs and zeros; large ones."""
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    return x, 1e4 * x


def check(model, masks, shape):
    c = export.run_c(export.to_c(model, masks, shape), STRICT)
    onnx = export.run_onnx(export.to_onnx(model, masks, shape))
    for x in batches(shape):
        export.verify(c, model, masks, x, "C")
        export.verify(onnx, model, masks, x, "ONNX")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_networks(draw_network, data):
    check(*draw_network(data.draw))


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_random_networks(draw_network, data):
    check(*draw_network(data.draw))


def masked(model, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) < density for name, w in maskable(model).items()}


def resnet(randomise, **options):
    model = models.build("resnet20", 10, width=8, **options).eval()
    randomise(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05, 0.01])
def test_residual_network(randomise, density):
    model = resnet(randomise)
    check(model, masked(model, density), (3, 32, 32))


def test_all_layers_dead(randomise):
    model = resnet(randomise)
    check(model, masked(model, 0.0), (3, 32, 32))


@pytest.mark.parametrize("name", ["layer1.1.conv2.weight", "layer2.0.conv1.weight", "layer2.0.shortcut.0.weight"])
def test_one_dead_layer_and_one_with_one_weight(randomise, name):
    model = resnet(randomise)
    masks = masked(model, 0.2)
    masks[name] = torch.zeros_like(masks[name])
    masks["layer3.1.conv1.weight"] = torch.zeros_like(masks["layer3.1.conv1.weight"])
    masks["layer3.1.conv1.weight"][1, 2, 0, 1] = True
    check(model, masks, (3, 32, 32))


def test_shared_blocks(randomise):
    model = resnet(randomise)
    share(model)
    for module in model.modules():
        if hasattr(module, "scale"):
            module.scale.data.fill_(0.7)
    check(model, masked(model, 0.1), (3, 32, 32))


@pytest.mark.parametrize("name, size", [("vgg16", 33), ("wrn-10-1", 16), ("cnn", 12), ("lenet5", 28), ("mlp", 8)])
def test_other_networks(randomise, name, size):
    model = models.build(name, 5, 1, size, **({} if name in ("lenet5", "mlp") else {"width": 4})).eval()
    randomise(model, torch.Generator().manual_seed(1))
    check(model, masked(model, 0.2), (1, size, size))


def test_a_bottleneck_network_of_torchvision(randomise):
    model = models.build("torchvision:resnet50", 7, image_size=64).eval()
    randomise(model, torch.Generator().manual_seed(2))
    masks = masked(model, 0.001)
    check(model, masks, (3, 64, 64))


class Doubled(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 1)


@pytest.mark.parametrize(
    "model", [nn.Identity(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.ReLU(), Doubled()], ids=str
)
def test_networks_without_weights(model):
    check(model.eval(), {}, (2, 6, 6))


def test_lines_and_vectors():
    line = nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 5))
    check(line.eval(), {}, (2, 40))
    vector = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    check(vector, {"0.weight": torch.eye(6, 5, dtype=torch.bool)}, (5,))


def test_a_constant_is_exact_at_a_padded_border():
    """A channel without active inputs is its bias inside, but zero outside the border."""
    first, second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    first.bias.data = torch.tensor([0.5, 2.0])
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[1] = False
    check(model, {"0.weight": mask}, (1, 5, 6))


def test_the_model_is_left_as_it_was(randomise):
    model = resnet(randomise).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = masked(model, 0.1)
    export.to_c(model, masks, (3, 32, 32))
    export.to_onnx(model, masks, (3, 32, 32))
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
