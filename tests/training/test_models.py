import sys

import pytest
import torch
from torch import nn

from east_plugins import Config, train
from east_plugins.errors import MissingExtraError, UnknownNameError, UsageError
from east_plugins.training import models

PARAMETERS = {  # for 3 channels; published as 11.2, 21.3, 23.5, 0.27, 0.86, 1.5, 11.0, 36.5, 14.7 M
    ("resnet18", 10): 11_173_962,
    ("resnet34", 100): 21_328_292,
    ("resnet50", 10): 23_520_842,
    ("resnet20", 10): 272_474,
    ("resnet56", 10): 855_770,
    ("wrn-28-2", 10): 1_467_610,
    ("wrn-16-8", 10): 10_961_370,
    ("wrn-28-10", 10): 36_479_194,
    ("vgg16", 10): 14_724_042,
}


def build_without_memory(*args, **kwargs):
    with torch.device("meta"):
        return models.build(*args, **kwargs)


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_sizes(name, classes):
    assert size(build_without_memory(name, classes)) == PARAMETERS[name, classes]


def test_lenets_have_their_published_sizes():
    assert size(build_without_memory("mlp", 10, in_channels=1, image_size=28)) == 266_610
    assert size(build_without_memory("lenet5", 10, in_channels=1, image_size=28)) == 431_080


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, (channels, pixels, pixels))
        for name in models.names()
        for channels, pixels in [(3, 32), (1, 8), (1, 16), (1, 28), (3, 64)]
        if (name, pixels) != ("lenet5", 8)  # its convolutions reach further
    ],
    ids=str,
)
def test_every_network_takes_small_images_of_any_size_and_gives_logits(name, shape):
    model = build_without_memory(name, 7, in_channels=shape[0], image_size=shape[1])
    assert model(torch.zeros(2, *shape, device="meta")).shape == (2, 7)


def test_parameter_names_are_those_of_the_published_scripts():
    names = dict(build_without_memory("resnet34", 10).named_parameters()).keys()
    assert {
        "conv1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer1.0.bn2.weight",
        "layer2.0.shortcut.0.weight",
        "layer2.0.shortcut.1.bias",
        "layer4.2.conv2.weight",
        "fc.weight",
    } <= names
    assert "layer1.0.shortcut.0.weight" not in names
    wide = dict(build_without_memory("wrn-16-8", 10).named_parameters()).keys()
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.1.bn2.weight", "bn1.weight", "fc.bias"} <= wide


def test_convolutions_before_a_norm_have_no_bias():
    for name in set(models.names()) - {"lenet5", "mlp", "small-mlp", "large-mlp", "small-cnn"}:
        assert all(m.bias is None for m in build_without_memory(name, 10).modules() if isinstance(m, nn.Conv2d))


def test_residual_blocks_compute_what_their_equations_say():
    def normed(norm, x):
        return (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()

    basic, wide = models.BasicBlock(4, 8, 2).double().eval(), models.PreActivationBlock(4, 8, 2).double().eval()
    for block in (basic, wide):
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    inner = basic.conv2(normed(basic.bn1, basic.conv1(x)).clamp(min=0))
    projected = normed(basic.shortcut[1], basic.shortcut[0](x))
    torch.testing.assert_close(basic(x), (normed(basic.bn2, inner) + projected).clamp(min=0))
    active = normed(wide.bn1, x).clamp(min=0)
    inner = wide.conv2(normed(wide.bn2, wide.conv1(active)).clamp(min=0))
    torch.testing.assert_close(wide(x), inner + wide.shortcut(active))


def test_width_scales_every_layer():
    model = build_without_memory("resnet34", 10, width=16)
    assert [model.conv1.out_channels, model.layer4[0].conv1.out_channels, model.fc.in_features] == [16, 128, 128]
    assert build_without_memory("wrn-28-2", 10, width=8).fc.in_features == 64
    assert build_without_memory("vgg16", 10, width=4).fc.in_features == 32


def test_any_wide_resnet_can_be_asked_for():
    model = build_without_memory("wrn-10-3", 10)
    assert len(model.layer1) == 1
    assert model.fc.in_features == 4 * 16 * 3
    with pytest.raises(UsageError, match="depth of a WRN is 10, 16, 22"):
        models.build("wrn-27-2", 10)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mlp", 10, 1, 28, 16), "`width` 16: mlp has no base width"),
        (("resnet18", 10, 3, 32, 0), "`width` 0: resnet18 needs a width of at least 1"),
        (("lenet5", 10, 1, 8), "lenet5 needs images of at least 16 pixels, got 8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_in_one_line(args, message):
    with pytest.raises(UsageError, match=message) as error:
        models.build(*args)
    assert "\n" not in str(error.value)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean.*resnet34"):
        models.build("resnet35", 10)
    with pytest.raises(UnknownNameError, match="mobilenet_v2.*torchvision:<name>"):  # the images are too small
        models.build("mobilenet_v2", 10, image_size=32)


def test_names_are_listed_by_pattern():
    assert models.names("resnet*") == ["resnet18", "resnet34", "resnet50", "resnet20", "resnet56"]
    assert {"mlp", "lenet5", "cnn", "vgg16"} <= set(models.names())


def test_torchvision_networks():
    pytest.importorskip("PIL")
    names = models.names("torchvision:*")
    assert "torchvision:resnet50" in names
    model = build_without_memory("torchvision:resnet50", 1000, image_size=224)
    assert size(model) == 25_557_032
    assert size(build_without_memory("mobilenet_v2", 1000, image_size=224)) == 3_504_872
    with pytest.raises(UnknownNameError, match="did you mean .*torchvision:resnet50"):
        models.build("torchvision:resnt50", 10)
    with pytest.raises(UsageError, match="takes 3 channels, got images of 1 channel"):
        models.build("torchvision:resnet50", 10, in_channels=1)
    with pytest.raises(UsageError, match="`width` 16"):
        models.build("torchvision:resnet50", 10, width=16)


def test_timm_networks():
    pytest.importorskip("timm")
    assert "timm:convnext_tiny" in models.names("timm:*")
    assert size(build_without_memory("timm:convnext_tiny", 1000, image_size=224)) == 28_589_128
    assert models.build("timm:vit_tiny_patch16_224", 7, 1, 32)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert size(build_without_memory("timm:resnet34", 10)) == size(build_without_memory("torchvision:resnet34", 10))
    with pytest.raises(UnknownNameError, match="did you mean .*timm:convnext_atto") as error:
        models.build("timm:convnext_atoo", 10)
    assert len(str(error.value)) < 4000
    with pytest.raises(UsageError, match="`width` 16"):
        models.build("timm:convnext_atto", 10, width=16)


@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:vit_tiny_patch16_224", "torchvision:vgg11"])
def test_images_that_are_too_small_for_a_network_of_others_are_one_line(name):
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=f"model {name} does not take images of 8 pixels: ") as error:
        models.build(name, 10, image_size=8)
    assert "\n" not in str(error.value)


def test_timm_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="^timm is not installed: pip install timm$"):
        models.build("timm:convnext_tiny", 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_vit", "timm:mobilenetv2_035"])
def test_timm_networks_are_trained_by_name(name, tmp_path):
    pytest.importorskip("timm")
    settings = dict(data="digits", image_size=32, limit=64, epochs=1, method="rigl", density=0.1)
    summary = train(Config(model=name, **settings), tmp_path / "run")
    assert summary["model"] == name and summary["nonzeros"] == round(0.1 * summary["maskable"])
