"""Blocks of timm's networks (ConvNeXt, ViT, MobileNetV2, EfficientNet): the engine, DyReLU in place of their
activations, and export."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Engine, Masking, PhaseOut, attach, export, factory
from east_plugins.training import models

pytestmark = pytest.mark.slow

#: Pixels and the activation.
NETWORKS = {
    "timm:test_convnext": (32, "gelu"), "timm:test_vit": (64, "gelu"),
    "timm:mobilenetv2_035": (64, "relu6"), "timm:test_efficientnet": (32, "silu"),
    "timm:test_resnet": (32, "relu"),
}  # fmt: skip


def trained(name, engine, dyrelu):
    pytest.importorskip("timm")
    size, activation = NETWORKS[name]
    shape = (3, size, size)
    torch.manual_seed(0)
    model = models.build(name, 5, 3, size).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # else the rounding of channels that are nearly constant grows from layer to layer
            nn.init.normal_(module.bias, std=0.3)
        for rate in ("p", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    plugins = []
    if dyrelu:
        generator = torch.Generator().manual_seed(0)
        phase_out = PhaseOut(1, 4)
        plugins = [attach(model, factory("b"), shape, replaces=(activation,), phase_out=phase_out, generator=generator)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    host = Masking(optimizer, death_rate=0.3, growth_mode="gradient", update_frequency=3, seed=0, plugins=plugins)
    host.add_module(model, density=0.1, sparse_init="connected", input_shape=shape)
    chosen = Engine(host, shape, engine)
    for step in range(6):
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        host.step()
    assert not any(phased.sites for phased in plugins)
    return model, host, chosen


@pytest.mark.parametrize("dyrelu", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_trains_the_same_with_every_engine(name, dyrelu):
    (ours, host, engine), (theirs, reference, _) = (trained(name, engine, dyrelu) for engine in ("sparse", "dense"))
    assert not engine.dense, engine.reason
    assert host.nonzeros == reference.nonzeros == round(0.1 * host.theoretical_size)
    assert all(torch.equal(mask, reference.masks[layer]) for layer, mask in host.masks.items())
    for (key, found), wanted in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_is_exported(name):
    model, host, engine = trained(name, "dense", False)
    shape, masks = engine.input_shape, dict(host.masks)
    engine.remove()
    model.float().eval()
    x = torch.randn(3, *shape)
    export.verify(export.run_c(export.to_c(model, masks, shape), ("-O1",)), model, masks, x, "C")
    export.verify(export.run_onnx(export.to_onnx(model, masks, shape)), model, masks, x, "ONNX")
