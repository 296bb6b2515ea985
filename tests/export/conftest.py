import pytest
import torch
from hypothesis import strategies as st
from torch import nn


class Block(nn.Module):
    """A residual block; its shortcut is a strided convolution where the shape changes."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PreActivation(nn.Module):
    """A residual block whose stream is linear."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + 0.5 * self.conv(self.norm(x).relu())


class Twice(nn.Module):
    """One module used twice, its results added with a sign."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        y = self.module(x)
        return self.module(nn.functional.relu_(y - 0.1)) - y


class Dense(nn.Module):
    """Concatenation of the input and what is computed of it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat([x, self.module(x)], 1)


def _layer(draw, channels, size):
    """One more layer for planes of (height, width) `size` at least 3."""
    out = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["conv", "norm", "relu", "block", "pre", "twice", "cat", "grouped", "max", "avg"]))
    if kind == "conv":
        kernel = draw(st.sampled_from([1, 2, 3, (3, 1), 5]))
        stride, padding, dilation = draw(st.sampled_from([1, 2, (1, 2), 3])), draw(st.integers(0, 2)), 1
        if kernel == 3 and padding == 2:
            dilation = draw(st.integers(1, 2))
        return nn.Conv2d(channels, out, kernel, stride, padding, dilation)
    if kind == "grouped":
        return nn.Conv2d(channels, channels * 2, 3, padding=1, groups=channels, bias=False)
    if kind == "block":
        return Block(channels, draw(st.sampled_from([channels, out])), draw(st.integers(1, 2)))
    return {
        "norm": lambda: nn.BatchNorm2d(channels),
        "relu": nn.ReLU,
        "pre": lambda: PreActivation(channels),
        "twice": lambda: Twice(nn.Conv2d(channels, channels, 3, padding=1, bias=False)),
        "cat": lambda: Dense(nn.Conv2d(channels, 2, 3, padding=1)),
        "max": lambda: nn.MaxPool2d(3, draw(st.integers(1, 2)), draw(st.integers(0, 1)), ceil_mode=draw(st.booleans())),
        "avg": lambda: nn.AvgPool2d(2, draw(st.integers(1, 2)), draw(st.integers(0, 1))),
    }[kind]()


def _network(draw):
    channels, height, width = shape = draw(st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)))
    layers, x = [], torch.zeros(1, *shape)
    for _ in range(draw(st.integers(1, 7))):
        layer = _layer(draw, x.shape[1], x.shape[2:]).eval()
        try:
            y = layer(x)
        except RuntimeError:  # a kernel larger than the plane
            continue
        layers.append(layer)
        x = y
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
        x = layers[-1](x)
    layers += [nn.Flatten(), nn.Linear(x[0].numel(), draw(st.integers(1, 5)))]
    return nn.Sequential(*layers), shape


def _masks(draw, model, generator):
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            share = draw(st.sampled_from([0.3, 0.1, 0.6, 1.0, 0.0]))
            mask = torch.rand(parameter.shape, generator=generator) < share
            if draw(st.booleans()):
                mask.view(-1)[torch.randint(mask.numel(), (1,), generator=generator)] = True
            masks[name] = mask
    return masks


def randomise(model, generator):
    """Random values, norm statistics included, the network's scale kept."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.weight.data[torch.rand(len(module.weight), generator=generator) < 0.2] *= -1
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
            if module.bias is not None:
                module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))


@pytest.fixture(name="randomise")
def _randomise():
    return randomise


@pytest.fixture
def draw_network():
    """draw -> a random small network in evaluation mode, its masks and the shape of its input."""

    def make(draw):
        model, shape = _network(draw)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        randomise(model, generator)
        masks = _masks(draw, model, generator)
        return model.eval(), masks, shape

    return make
