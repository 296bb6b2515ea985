"""Layers that are no sums: gates, norms over channels, softmax, attention, and what only moves numbers. C, ONNX of the
active weights and dense ONNX each compute what PyTorch computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import UsageError, export
from east_plugins.export.graph import trace
from east_plugins.export.onnx_dense import dense_onnx
from east_plugins.ops.maskable import maskable

SHAPE = (2, 8, 8)
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1")


def conv(inputs=2, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Excited(nn.Module):
    """A convolution whose channels are scaled by what their means say (squeeze and excitation)."""

    def __init__(self):
        super().__init__()
        self.conv, self.excite = conv(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.excite(F.adaptive_avg_pool2d(x, 1)))


class Shuffled(nn.Module):
    """Halves of channels, one of them computed, shuffled; then a slice of the positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = conv(), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        y = torch.cat([a, self.other(b)], 1)
        y = y.view(len(y), 2, 3, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return y[:, :, 1:, ::2]


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.LayerNorm(4)
        self.up, self.down, self.scale = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.conv(x)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """Patches with positions, one block of attention, and a class token or the mean."""

    def __init__(self, token):
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(2, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(1, 16 + token, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8)) if token else None

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class Own(nn.Module):
    """Attention written out, with the softmax of scaled products."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Conv2d(2, 12, 1), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, 2)
        return self.head(((q @ k.transpose(1, 2) / 2).softmax(-1) @ v).mean(1))


class Gated(nn.Module):
    """Products of equal shapes, and a difference of a tensor and its spread mean."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        y = self.a(x) * self.b(x).tanh()
        return y - 0.5 * y.mean((2, 3), keepdim=True)


def then(*modules):
    return lambda: nn.Sequential(conv(), *modules)


NETWORKS = {
    "sigmoid": then(nn.Sigmoid()), "silu": then(nn.SiLU()), "hardswish": then(nn.Hardswish()),
    "relu6": then(nn.ReLU6()), "hardsigmoid": then(nn.Hardsigmoid()), "tanh": then(nn.Tanh()), "gelu": then(nn.GELU()),
    "gelu tanh": then(nn.GELU("tanh")), "group norm": then(nn.GroupNorm(2, 4)), "softmax": then(nn.Softmax(1)),
    "log_softmax": then(nn.Flatten(), nn.Linear(256, 5), nn.LogSoftmax(1)),
    "upsampling": then(nn.Upsample(scale_factor=2)), "pixel shuffle": then(nn.PixelShuffle(2), conv(1)),
    "channel shuffle": then(nn.ChannelShuffle(2), conv(4)), "pooled": then(nn.AdaptiveAvgPool2d(1), nn.SiLU()),
    "excited": Excited, "shuffled": Shuffled, "convnext": ConvNeXt, "attention": lambda: Transformer(0),
    "class token": lambda: Transformer(1), "attention written out": Own, "gated": Gated,
}  # fmt: skip


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_are_no_sums(name, density):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    masks = {name: torch.rand(weight.shape) < density for name, weight in maskable(model).items()}
    x = 2 * torch.randn(4, *SHAPE)
    x[0] = 0
    export.verify(export.run_c(export.to_c(model, masks, SHAPE), STRICT), model, masks, x, "C")
    export.verify(export.run_onnx(export.to_onnx(model, masks, SHAPE)), model, masks, x, "ONNX")
    export.verify(export.run_onnx(dense_onnx(trace(model, masks, SHAPE))), model, masks, x, "dense ONNX")


@pytest.mark.parametrize("name", ["silu", "gelu tanh", "softmax", "log_softmax", "excited"])
def test_large_numbers_overflow_nowhere(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = 1e4 * torch.randn(4, *SHAPE)
    export.verify(export.run_c(export.to_c(model, {}, SHAPE), STRICT), model, {}, x, "C")
    export.verify(export.run_onnx(export.to_onnx(model, {}, SHAPE)), model, {}, x, "ONNX")


@pytest.mark.parametrize("name", ["convnext", "group norm", "class token", "excited", "softmax"])
def test_dead_layers_fold_into_constants(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    first = next(iter(maskable(model)))
    masks = {first: torch.zeros_like(maskable(model)[first], dtype=torch.bool)}
    x = torch.randn(3, *SHAPE)
    export.verify(export.run_c(export.to_c(model, masks, SHAPE), STRICT), model, masks, x, "C")
    export.verify(export.run_onnx(export.to_onnx(model, masks, SHAPE)), model, masks, x, "ONNX")


class Looked(nn.Module):
    def forward(self, x):
        return x.index_select(1, x.flatten(1).argmax(1) % 2)


@pytest.mark.parametrize(
    "model, words",
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), "export does not support upsample_bilinear2d"),
        (nn.Softmax(2), "export does not support softmax over positions"),
        (nn.LayerNorm([4, 8, 8]), "export does not support layer norm over more than one axis"),
        (nn.LogSigmoid(), "export does not support log_sigmoid_forward"),
        (Looked(), "export does not support argmax"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_the_rest_is_refused_in_one_line(model, words):
    model = nn.Sequential(conv(), model).eval()
    for write in (export.to_c, export.to_onnx):
        with pytest.raises(UsageError, match=f"^1: {words}; it does 1d and 2d") as error:
            write(model, {}, SHAPE)
        assert "\n" not in str(error.value)
