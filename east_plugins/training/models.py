"""Networks by name. Ours have the CIFAR stem (3x3, stride 1, no max-pool) and pool adaptively, so that 8- to
64-pixel images work; networks for 224-pixel images come from torchvision.

Parameter names follow the published DST scripts: `conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.shortcut.0`,
`fc`. Every network returns logits. Initial values are PyTorch's, from its global generator: seed it first.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..ops.vision import import_torchvision

log = logging.getLogger(__name__)

TORCHVISION, TIMM = "torchvision:", "timm:"
AUXILIARY_OUTPUTS = {"googlenet", "inception_v3"}  # return tuples in training, so they are not offered


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)


def conv1x1(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, stride=stride, bias=False)


def shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    """The identity, or a projection where the shape changes."""
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity (He et al. 2016)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside an identity; four times `width` channels out (He et al. 2016)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv1x1(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each 3x3 convolution (Zagoruyko and Komodakis 2016).

    Where the shape changes, the shortcut is a convolution of the activated input.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        same_shape = stride == 1 and channels == width
        self.shortcut = None if same_shape else conv1x1(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        return identity + self.conv2(self.relu2(self.bn2(self.conv1(out))))


def network(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def stages(block: type[nn.Module], depths: Sequence[int], stem: int, width: int) -> tuple[dict, int]:
    """`layer1`, `layer2`, ... of residual blocks, and their last channels.

    Each stage has twice the channels of the one before at half the resolution.
    """
    layers, channels = {}, stem
    for stage, depth in enumerate(depths):
        strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
        blocks = nn.Sequential()
        for stride in strides:
            blocks.append(block(channels, width << stage, stride))
            channels = (width << stage) * block.expansion
        layers[f"layer{stage + 1}"] = blocks
    return layers, channels


def head(channels: int, classes: int) -> dict[str, nn.Module]:
    """The mean over positions, then a linear layer."""
    return dict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, classes))


def resnet(block, depths, classes: int, channels: int, size: int, width: int) -> nn.Sequential:
    """Residual network (He et al. 2016); its blocks call ReLU as a function, as the DST scripts do."""
    layers, out = stages(block, depths, width, width)
    stem = dict(conv1=conv3x3(channels, width), bn1=nn.BatchNorm2d(width), relu=nn.ReLU())
    return network(**stem, **layers, **head(out, classes))


def wide_resnet(depth: int, widen: int, classes: int, channels: int, size: int, width: int) -> nn.Sequential:
    """WRN-depth-widen, without dropout (Zagoruyko and Komodakis 2016)."""
    layers, out = stages(PreActivationBlock, [(depth - 4) // 6] * 3, width, width * widen)
    last = dict(bn1=nn.BatchNorm2d(out), relu=nn.ReLU())
    return network(conv1=conv3x3(channels, width), **layers, **last, **head(out, classes))


def plain(plan: str, classes: int, channels: int, size: int, width: int) -> nn.Sequential:
    """3x3 convolutions with norm and ReLU. In `plan` a number is channels / width, `M` a max-pool by two."""
    features = nn.Sequential()
    for step in plan.split():
        if step == "M":
            features.append(nn.MaxPool2d(2, ceil_mode=True))  # one pixel stays one
        else:
            out = int(step) * width
            features.extend([conv3x3(channels, out), nn.BatchNorm2d(out), nn.ReLU()])
            channels = out
    return network(features=features, **head(channels, classes))


class TwoLogits(nn.Module):
    """0 and z of one output z: their cross-entropy is the binary one of sigmoid(z)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * 0.0, x], 1)


def mlp(
    hidden: tuple[int, int], classes: int, channels: int, size: int, width: None, one_output: bool = False
) -> nn.Sequential:
    """Two hidden layers, for images of any size and rows of a table; `one_output` where there are two classes."""
    single = one_output and classes == 2
    layers = dict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * size * size, hidden[0]),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden[0], hidden[1]),
        relu2=nn.ReLU(),
        fc3=nn.Linear(hidden[1], 1 if single else classes),
    )
    return network(**layers, **(dict(logits=TwoLogits()) if single else {}))


def small_cnn(classes: int, channels: int, size: int, width: int) -> nn.Sequential:
    """Three 3x3 convolutions with biases and no norms, each with twice the channels of the one before, max-pools by two
    between them (Nowak et al. 2023, Table 2)."""
    return network(
        conv1=nn.Conv2d(channels, width, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2, ceil_mode=True),
        conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2, ceil_mode=True),
        conv3=nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        relu3=nn.ReLU(),
        **head(4 * width, classes),
    )


def lenet5(classes: int, channels: int, size: int, width: None) -> nn.Sequential:
    """LeNet-5 in Caffe's variant: no padding, 20 and 50 channels, 500 hidden units."""
    side = ((size - 4) // 2 - 4) // 2
    if side < 1:
        raise UsageError(f"lenet5 needs images of at least 16 pixels, got {size}")
    return network(
        conv1=nn.Conv2d(channels, 20, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc3=nn.Linear(50 * side * side, 500),
        relu3=nn.ReLU(),
        fc4=nn.Linear(500, classes),
    )


class Model(NamedTuple):
    """`make(classes, channels, image size, width)` and the default width, None where there is none."""

    make: Callable[[int, int, int, int | None], nn.Module]
    width: int | None


MODELS = {
    "resnet18": Model(partial(resnet, BasicBlock, (2, 2, 2, 2)), 64),
    "resnet34": Model(partial(resnet, BasicBlock, (3, 4, 6, 3)), 64),
    "resnet50": Model(partial(resnet, Bottleneck, (3, 4, 6, 3)), 64),
    "resnet20": Model(partial(resnet, BasicBlock, (3, 3, 3)), 16),
    "resnet56": Model(partial(resnet, BasicBlock, (9, 9, 9)), 16),
    "wrn-28-2": Model(partial(wide_resnet, 28, 2), 16),
    "wrn-16-8": Model(partial(wide_resnet, 16, 8), 16),
    "wrn-28-10": Model(partial(wide_resnet, 28, 10), 16),
    "vgg16": Model(partial(plain, "1 1 M 2 2 M 4 4 4 M 8 8 8 M 8 8 8"), 64),
    "cnn": Model(partial(plain, "1 M 2 M 4"), 32),
    "mlp": Model(partial(mlp, (300, 100)), None),  # LeNet-300-100 (LeCun et al. 1998)
    "small-mlp": Model(partial(mlp, (256, 256), one_output=True), None),  # Nowak et al. 2023, Table 2
    "large-mlp": Model(partial(mlp, (1024, 512)), None),
    "small-cnn": Model(small_cnn, 32),
    "lenet5": Model(lenet5, None),
}


def names(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, such as `resnet*`; `torchvision:*` lists torchvision's classifiers, `timm:*`
    timm's.

    Any `wrn-<6n+4>-<k>` can be built besides the ones listed.
    """
    if pattern.startswith(TIMM):
        known: Sequence[str] = _timm_names()
    else:
        known = _torchvision_names() if pattern.startswith(TORCHVISION) else list(MODELS)
    return fnmatch.filter(known, pattern)


def build(
    name: str, num_classes: int, in_channels: int = 3, image_size: int = 32, width: int | None = None
) -> nn.Module:
    """A new network for `in_channels` x `image_size` x `image_size` images.

    `width` is the channels of the stem (64 in ResNet-34, 16 in ResNet-20 and WRN); all others scale with it.
    `torchvision:<name>` is torchvision's network, untrained, and `timm:<name>` is timm's. Names of torchvision's that
    are none of ours need no prefix where images have 64 pixels or more.

    Raises `UnknownNameError` with the nearest names, `UsageError` where the network cannot be made so,
    `MissingExtraError` where torchvision or timm is needed and not installed.
    """
    if name.startswith(TORCHVISION):
        return _torchvision(name, num_classes, in_channels, image_size, width)
    if name.startswith(TIMM):
        return _timm(name, num_classes, in_channels, image_size, width)
    model = MODELS.get(name) or _any_wide_resnet(name)
    if model is None:
        if image_size >= 64 and TORCHVISION + name in _torchvision_names():
            return _torchvision(TORCHVISION + name, num_classes, in_channels, image_size, width)
        raise UnknownNameError("`model`", name, [*names(), "wrn-<6n+4>-<k>", "torchvision:<name>", "timm:<name>"])
    if width is not None and (model.width is None or width < 1):
        allowed = "has no base width: leave it out" if model.width is None else "needs a width of at least 1"
        raise UsageError(f"`width` {width}: {name} {allowed}")
    if image_size > 64:
        log.warning("%s keeps the full resolution of its images; torchvision's are made for 224 pixels", name)
    return model.make(num_classes, in_channels, image_size, width or model.width)


def _any_wide_resnet(name: str) -> Model | None:
    match = re.fullmatch(r"wrn-(\d+)-([1-9]\d*)", name)
    if match is None:
        return None
    depth, widen = map(int, match.groups())
    if depth < 10 or depth % 6 != 4:
        raise UsageError(f"model {name}: the depth of a WRN is 10, 16, 22, 28, ..., got {depth}")
    return Model(partial(wide_resnet, depth, widen), 16)


def _torchvision_names() -> list[str]:
    models = import_torchvision().models
    return [TORCHVISION + name for name in models.list_models(module=models) if name not in AUXILIARY_OUTPUTS]


def _torchvision(name: str, num_classes: int, in_channels: int, image_size: int, width: int | None) -> nn.Module:
    if name not in (known := _torchvision_names()):
        raise UnknownNameError("`model`", name, known)
    if in_channels != 3 or width is not None:
        wrong = f"`width` {width}" if width is not None else f"images of {in_channels} channels"
        raise UsageError(f"model {name} has a fixed width and takes 3 channels, got {wrong}")
    make = partial(
        import_torchvision().models.get_model, name.removeprefix(TORCHVISION), weights=None, num_classes=num_classes
    )
    if name.startswith(TORCHVISION + "vit_"):
        make = partial(make, image_size=image_size)
    return _made(name, make, in_channels, image_size)


def _timm_names() -> list[str]:
    return [TIMM + name for name in _import_timm().list_models()]


def _timm(name: str, num_classes: int, in_channels: int, image_size: int, width: int | None) -> nn.Module:
    if name not in (known := _timm_names()):
        raise UnknownNameError("`model`", name, known)
    if width is not None:
        raise UsageError(f"model {name} has a fixed width, got `width` {width}")
    make = partial(_import_timm().create_model, name.removeprefix(TIMM), num_classes=num_classes, in_chans=in_channels)
    try:
        return _made(name, partial(make, img_size=image_size), in_channels, image_size)  # transformers need it
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return _made(name, make, in_channels, image_size)


def _made(name: str, make: Callable[[], nn.Module], channels: int, size: int) -> nn.Module:
    """What another package makes; raises `UsageError` where it does not take images of this size."""
    try:
        model = make()
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, size, size))
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"model {name} does not take images of {size} pixels: {reason}") from error
    return model.train()


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm is not installed: pip install timm") from error
    return timm
