"""The engine, activations, masks and export on networks of kinds that are not ours.

Every network is trained for 20 steps with two updates, by the sparse engine and densely under the same masks, and must
come out the same; its parameters stay the very same objects.
"""

import copy
import io
import logging
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.export.formats import load_sparse
from east_plugins.export.graph import trace
from east_plugins.export.safetensors import to_safetensors
from east_plugins.ops.paths import effective_density, on_path
from east_plugins.plugins.activation import PhasedActivations, PhaseOut, attach, factory
from east_plugins.plugins.allocation.saliency import SynFlow
from east_plugins.plugins.transform.sharing import share
from east_plugins.sparse import Engine

SHAPE = (3, 8, 8)


def batch(step, shape=SHAPE, size=8, integers=0):
    generator = torch.Generator().manual_seed(step)
    if integers:
        return torch.randint(integers, (size, *shape), generator=generator), torch.randint(
            5, (size,), generator=generator
        )
    x = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (size,), generator=generator)


def build(network, engine, *, shape=SHAPE, density=0.3, dyrelu=False, growth="gradient", **kwargs):
    torch.manual_seed(0)
    model = network().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.bias, std=0.3)  # constants of exactly 0 would leave a ReLU's side to rounding
    phased = attach(model, factory("b"), shape, phase_out=PhaseOut(8, 15)) if dyrelu else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    host = Masking(
        optimizer, death_rate=0.3, growth_mode=growth, update_frequency=7, seed=0, plugins=[phased] if phased else []
    )
    start = dict(sparse_init="connected", input_shape=shape) | kwargs
    host.add_module(model, density=density, **start)
    return model, host, Engine(host, shape, engine)


def train(model, host, steps=20, first=0, forward=None, between=lambda: None, **batches):
    for step in range(first, first + steps):
        x, y = batch(step, **batches)
        host.optimizer.zero_grad()
        torch.manual_seed(step)
        output = (forward or model)(x)
        F.cross_entropy(output if isinstance(output, torch.Tensor) else sum(output), y).backward()
        between()
        host.step()


def assert_same(ours, theirs, tolerance=1e-9):
    for name, mask in theirs[1].masks.items():
        assert torch.equal(ours[1].masks[name], mask), name
        assert not ours[0].get_parameter(name)[~mask].any()
    assert ours[1].nonzeros == theirs[1].nonzeros
    for (name, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_trains_the_same(network, *, dense=False, shape=SHAPE, integers=0, **kwargs):
    """`dense`: whether the engine is to find that it cannot compute this network."""
    ours, theirs = (build(network, engine, shape=shape, **kwargs) for engine in ("sparse", "dense"))
    parameters = list(ours[0].parameters()) if not kwargs.get("dyrelu") else None
    for model, host, _ in (ours, theirs):
        train(model, host, shape=shape, integers=integers)
    assert_same(ours, theirs)
    assert ours[2].dense == dense
    if parameters is not None:
        assert all(a is b for a, b in zip(ours[0].parameters(), parameters, strict=True))
    x, _ = batch(99, shape, integers=integers)
    with torch.no_grad():
        outputs = (model.eval()(x) for model, _, _ in (ours, theirs))
        torch.testing.assert_close(*(o if isinstance(o, torch.Tensor) else o[0] for o in outputs))
    return ours


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **{"bias": False} | kwargs)


# ---------------------------------------------------------------- a module with two names


class Repeated(nn.Module):
    """One block three times, one ReLU everywhere."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        block = nn.Sequential(conv(12, 12), nn.BatchNorm2d(12), self.relu)
        self.stem, self.blocks = conv(3, 12), nn.Sequential(block, block, block)
        self.again, self.fc = self.blocks, nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.relu(self.stem(x))).mean((2, 3)))


class Tied(nn.Module):
    """One weight in two layers, one norm under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 10), conv(10, 10), conv(10, 10)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(10)
        self.alias, self.fc = self.norm, nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(self.stem(x))))
        return self.fc(F.relu(self.alias(self.b(x))).mean((2, 3)))


class Recurrent(nn.Module):
    """A cell called at every step, which a list holds once for each."""

    def __init__(self):
        super().__init__()
        cell = nn.Linear(16, 16)
        self.enter, self.cells, self.fc = nn.Linear(24, 16), nn.ModuleList([cell] * 4), nn.Linear(16, 5)

    def forward(self, x):
        h = torch.zeros(len(x), 16, dtype=x.dtype)
        rows = self.enter(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 24))
        for cell, row in zip(self.cells, rows.unbind(1)[:4], strict=True):
            h = torch.tanh(cell(h) + row)
        return self.fc(h)


def everything_that_substitutes(model, host):
    yield lambda: effective_density(model, host.masks, SHAPE)
    yield lambda: on_path(model, host.masks, SHAPE)
    yield lambda: SynFlow()(model, {n: int(m.sum()) for n, m in host.masks.items()}, SHAPE, torch.Generator())
    yield lambda: attach(model, factory("b"), SHAPE).remove()
    yield lambda: Engine(host, SHAPE, "sparse").remove()


@pytest.mark.parametrize("network", [Repeated, Tied])
def test_a_module_with_two_names_stays_what_it_is(network):
    model, host, engine = build(network, "dense")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [(*module._parameters.values(), *module._buffers.values()) for module in model.modules()]
    for call in everything_that_substitutes(model, host):
        call()
        now = [(*module._parameters.values(), *module._buffers.values()) for module in model.modules()]
        assert all(a is b for old, new in zip(objects, now, strict=True) for a, b in zip(old, new, strict=True))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("network", [Repeated, Tied, Recurrent])
def test_a_module_with_two_names_trains(network):
    assert_trains_the_same(network, density=0.5)


@pytest.mark.parametrize("network", [Repeated, Tied])
def test_a_module_with_two_names_takes_activations(network):
    assert_trains_the_same(network, density=0.5, dyrelu=True)


# ---------------------------------------------------------------- operations in place


class InPlace(nn.Module):
    """Operations in place on what norms and convolutions return."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.act = {
            "relu": nn.ReLU(True), "hardswish": nn.Hardswish(True), "silu": nn.SiLU(True), "relu6": nn.ReLU6(True),
            "leaky": nn.LeakyReLU(0.1, True), "elu": nn.ELU(inplace=True), "mish": nn.Mish(True),
        }.get(kind)  # fmt: skip
        self.stem, self.a, self.b, self.fc = conv(3, 16), conv(16, 16), conv(16, 16), nn.Linear(16, 5)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        identity = x = F.relu_(x) if self.kind == "after conv" else F.relu(x)
        out = self.norm1(self.a(x))
        out = self.act(out) if self.act is not None else F.relu_(out)
        out = self.norm2(self.b(out))
        out += identity
        if self.kind == "arithmetic":
            out *= 0.5
            out.sub_(0.1).clamp_(min=-2)
        out = out.relu_() if self.act is None else self.act(out)
        return self.fc(out.mean((2, 3)))


KINDS = ["relu", "hardswish", "silu", "relu6", "leaky", "elu", "mish", "functional", "after conv", "arithmetic"]


@pytest.mark.parametrize("kind", KINDS)
def test_operations_in_place(kind, caplog):
    assert_trains_the_same(lambda: InPlace(kind))
    assert "all channels" not in caplog.text


@pytest.mark.parametrize("kind", ["relu", "after conv", "arithmetic"])
def test_operations_in_place_beside_activations(kind):
    assert_trains_the_same(lambda: InPlace(kind), dyrelu=True)


def test_the_four_lines_of_the_readme_on_a_torchvision_network():
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = (
        build(lambda: torchvision.models.resnet18(num_classes=5), engine, shape=(3, 32, 32), density=0.02)
        for engine in ("sparse", "dense")
    )
    for model, host, _ in (ours, theirs):
        train(model, host, 3, shape=(3, 32, 32), size=4)
    assert not ours[2].dense
    assert_same(ours, theirs)


# ---------------------------------------------------------------- branches that run in training only


class Branches(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.stem, self.a, self.fc = conv(3, 16), conv(16, 16), nn.Linear(16, 5)
        self.norm = nn.BatchNorm2d(16)
        if branch is heads:
            self.aux = nn.Linear(16, 5)

    def forward(self, x):
        h = F.relu(self.norm(self.a(F.relu(self.stem(x)))))
        if self.training:
            h = self.branch(h)
        out = self.fc(h.mean((2, 3)))
        return (out, self.aux(h.amax((2, 3)))) if self.training and self.branch is heads else out


def centred(h):
    return h - h.mean(1, keepdim=True)


def attended(h):
    return h * h.softmax(1)


def scaled(h):
    return h / h.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def shuffled(h):
    return h.view(len(h), 4, 4, *h.shape[2:]).transpose(1, 2).reshape(h.shape)


def heads(h):
    return h


def largest(h):
    return h * (h.amax(1, keepdim=True) > 0.5)


@pytest.mark.parametrize("branch", [centred, attended, scaled, shuffled, heads, largest])
@pytest.mark.parametrize("dyrelu", [False, True])
def test_branches_that_run_in_training_only(branch, dyrelu):
    start = {"sparse_init": "ERK"} if branch is heads else {}  # a head of training only is on no path
    assert_trains_the_same(lambda: Branches(branch), density=0.1, dyrelu=dyrelu, **start)


def test_the_check_leaves_statistics_random_numbers_and_gradients_as_they_were():
    model, host, engine = build(lambda: Branches(centred), "sparse")
    x, _ = batch(0)
    buffers = [buffer.clone() for buffer in model.buffers()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    engine._plans, engine._masks = engine._plan(), None
    engine._settle(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


# ---------------------------------------------------------------- gradient checkpointing


class Checkpointed(nn.Module):
    def __init__(self, reentrant, parts=2):
        super().__init__()
        self.reentrant, self.parts = reentrant, parts
        self.stem, self.fc = conv(3, 12), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(nn.Sequential(conv(12, 12), nn.BatchNorm2d(12), nn.ReLU(True)) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.reentrant is not None else block(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("dyrelu", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, dyrelu):
    assert_trains_the_same(lambda: Checkpointed(reentrant), dyrelu=dyrelu)


def test_gradient_checkpointing_of_the_whole_network():
    ours, theirs = (build(lambda: Checkpointed(None), engine) for engine in ("sparse", "dense"))
    for model, host, _ in (ours, theirs):
        train(model, host, forward=lambda x, model=model: checkpoint(model, x, use_reentrant=False))
    assert_same(ours, theirs)


# ---------------------------------------------------------------- readers of gradients


class Plain(Checkpointed):
    def __init__(self):
        super().__init__(None)


@pytest.mark.parametrize("engine", ["sparse", "auto"])
def test_grad_is_that_of_the_active_weights_at_every_step(engine):
    (model, host, _), (reference, dense, _) = build(Plain, engine), build(Plain, "dense")
    for step in range(16):
        x, y = batch(step)
        for network, masking in ((model, host), (reference, dense)):
            masking.optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in (slice(0, 4), slice(4, 8)):  # accumulated
                F.cross_entropy(network(x[part]), y[part]).backward()
        for name, mask in dense.masks.items():
            torch.testing.assert_close(host.weights[name].grad, dense.weights[name].grad * mask, rtol=1e-9, atol=1e-12)
        host.step()
        dense.step()
    assert_same((model, host), (reference, dense))


@pytest.mark.parametrize("limit", [0.05, 0.2, 1e9])
def test_clipping_sees_one_norm_whatever_computes_the_gradients(limit, monkeypatch):
    ours = build(Plain, "sparse")
    theirs = build(Plain, "sparse")
    monkeypatch.setattr(theirs[2], "_plan", lambda: None)  # every pass is a dense one
    for model, host, _ in (ours, theirs):
        train(model, host, between=lambda model=model: nn.utils.clip_grad_norm_(model.parameters(), limit))
    assert_same(ours, theirs)


def penalised(model, x, y):
    return F.cross_entropy(model(x), y) + 1e-2 * sum(p.square().sum() for p in model.parameters())


def gathered(model, x, y):
    return F.cross_entropy(model(x), y) + model.stem.weight[0].abs().sum()


def twice(model, x, y):
    return F.cross_entropy(model(x), y) + F.cross_entropy(model(x.flip(3)), y)


@pytest.mark.parametrize("loss", [penalised, gathered, twice])
def test_losses_that_use_weights_directly(loss):
    ours, theirs = build(Plain, "sparse"), build(Plain, "dense")
    for step in range(16):
        x, y = batch(step)
        for model, host, _ in (ours, theirs):
            host.optimizer.zero_grad()
            loss(model, x, y).backward()
            host.step()
    assert_same(ours, theirs)


def test_autograd_grad_gives_the_gradient_of_the_active_weights():
    (model, host, _), (reference, _, _) = build(Plain, "sparse"), build(Plain, "dense")
    x, y = batch(0)
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    wanted = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
    for (name, parameter), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(a, b * host.masks.get(name, 1))
        assert parameter.grad is None


def test_hooks_on_parameters_get_dense_gradients_and_one_line_says_so(caplog):
    (model, host, _), (reference, dense, _) = build(Plain, "sparse"), build(Plain, "dense")
    seen = {}
    for key, network in (("ours", model), ("theirs", reference)):
        network.stem.weight.register_hook(lambda grad, key=key: seen.setdefault(key, []).append(grad.clone()))
    for network, masking in ((model, host), (reference, dense)):
        train(network, masking, 3)
    for a, b in zip(seen["ours"], seen["theirs"], strict=True):
        torch.testing.assert_close(a, b)
    assert caplog.text.count("a hook hangs on the gradient of stem.weight") == 1


def test_a_hook_that_changes_gradients_changes_the_same():
    (model, host, _), (reference, dense, _) = build(Plain, "sparse"), build(Plain, "dense")
    for network, masking in ((model, host), (reference, dense)):
        network.fc.weight.register_hook(lambda grad: grad - grad.mean(1, keepdim=True))
        train(network, masking)
    assert_same((model, host), (reference, dense))


def test_a_gradient_of_gradients_is_refused_in_one_line():
    model, _, _ = build(Plain, "sparse")
    x, y = batch(0)
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        F.cross_entropy(model(x.requires_grad_()), y).backward(create_graph=True)
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)


# ---------------------------------------------------------------- the axis of channels


class Tokens(nn.Module):
    """A block of a transformer, on tokens of 16 channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 5)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.fc(x.mean(1))


class ChannelsLast(nn.Module):
    """Convolutions between linear layers on [N, H, W, C]."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up, self.act, self.down, self.fc = nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.down(self.act(self.up(self.mix(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.fc(x.mean((2, 3)))


class Encoder(nn.Module):
    """PyTorch's own encoder layer, whose evaluation is one fused operation."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Linear(24, 16), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.fc(self.encoder(self.embed(x.transpose(1, 2).flatten(2))).mean(1))


class Rows(nn.Module):
    """A mixer: the second linear layer works along tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.fc = nn.Linear(3, 12), nn.Linear(64, 64), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.embed(x.flatten(2).movedim(1, 2)))
        return self.fc(F.relu(self.tokens(x.transpose(1, 2))).mean(2))


AXES = {Tokens: [(24, -1)], ChannelsLast: [(12, 1), (20, -1)], Encoder: [(20, -1)], Rows: [(12, -1), (64, -1)]}


@pytest.mark.parametrize("network", AXES)
def test_activations_lie_along_the_axis_of_channels(network):
    torch.manual_seed(0)
    model = network().double()
    phased = attach(model, nn.PReLU, SHAPE)
    assert sorted((site.act.num_parameters, site.axis) for site in phased.sites) == sorted(AXES[network])
    x, _ = batch(0)
    for site in phased.sites:
        with torch.no_grad():
            site.act.weight.zero_()  # is a ReLU
    plain = copy.deepcopy(model)
    PhasedActivations(plain).remove()
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), plain.train(mode)(x))
    with torch.no_grad():
        for site in phased.sites:
            site.act.weight.fill_(1)  # is the identity
        assert not torch.allclose(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("network", AXES)
@pytest.mark.parametrize("dyrelu", [False, True])
def test_transformers_and_channels_last_networks_train(network, dyrelu):
    assert_trains_the_same(network, density=0.5, dyrelu=dyrelu, sparse_init="ERK")


# ---------------------------------------------------------------- other layers and ways to call


class InstanceNormed(nn.Module):
    def __init__(self, affine, track):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 16), conv(16, 16), nn.Linear(16, 5)
        self.norm = nn.InstanceNorm2d(16, affine=affine, track_running_stats=track)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
def test_instance_norms(affine, track):
    assert_trains_the_same(lambda: InstanceNormed(affine, track), density=0.1)


class NormedAndActivated(nn.BatchNorm2d):
    """A norm with an activation in its forward, as timm's."""

    def forward(self, x):
        return F.silu(super().forward(x))


def test_norms_with_an_activation_in_them():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    assert_trains_the_same(
        lambda: nn.Sequential(conv(3, 16), NormedAndActivated(16), conv(16, 8), *copy.deepcopy(head))
    )


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1 (Qiao et al. 2019): its own way to compute with its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


def standardised():
    return nn.Sequential(
        Standardised(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(8 * 64, 5)
    )


def test_convolutions_with_a_forward_of_their_own_are_dense(caplog):
    assert_trains_the_same(standardised, dense=True, density=0.5, sparse_init="ERK")
    assert caplog.text.count("layer 0 (Standardised) computes with its weight in its own way") == 1


def test_parameters_of_half_precision_are_dense(caplog):
    torch.manual_seed(0)
    model = Plain().bfloat16()
    host = Masking(torch.optim.SGD(model.parameters(), lr=0.1), growth_mode="random", seed=0)
    host.add_module(model, density=0.3)
    assert Engine(host, SHAPE, "sparse").dense and "is of torch.bfloat16" in caplog.text
    F.cross_entropy(model(batch(0)[0].bfloat16()), batch(0)[1]).backward()
    host.step()


class Words(nn.Module):
    """An embedding first: its inputs are integers."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.fc = nn.Embedding(11, 16), nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.fc(F.relu(self.hidden(self.embed(x).mean(1))))


class TiedWords(Words):
    """The embedding's weight is that of a linear layer too."""

    def __init__(self):
        super().__init__()
        self.decode = nn.Linear(16, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return super().forward(x) + self.decode(self.embed(x).mean(1))[:, :5]


class Indexed(nn.Module):
    """A table looked up by indexing, convolved."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 8))
        self.a, self.fc = nn.Conv1d(8, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(F.relu(self.a(self.table[x].transpose(1, 2))).mean(2))


@pytest.mark.parametrize("network", [Words, TiedWords, Indexed])
def test_inputs_of_integers(network):
    assert_trains_the_same(network, shape=(6,), integers=11, density=0.5, sparse_init="ERK", input_shape=None)


class Features(nn.Module):
    """The usual pair of methods, which people call on their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc, self.block = conv(3, 8), nn.Linear(8, 5), nn.Sequential(conv(8, 8), nn.ReLU(True))

    def forward_features(self, x):
        return F.relu(self.block(F.relu(self.stem(x))))

    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["forward_features", "_features", "extract"])
def test_methods_called_in_place_of_forward_run_the_same_activations(method):
    cls = type("Features", (Features,), {method: Features.forward_features})
    torch.manual_seed(0)
    model = cls().double()
    attach(model, factory("b"), SHAPE)
    x, _ = batch(0)
    expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(model.fc(getattr(model, method)(x).mean((2, 3))), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("network", [Repeated, Plain, Features])
def test_threads_that_share_a_model_in_the_phase(network, engine):
    model, host, _ = build(network, engine)
    attach(model, factory("b"), SHAPE)
    model.eval()
    inputs = [batch(i)[0] for i in range(20)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong = []

    def work():
        with torch.no_grad():
            for x, y in zip(inputs, expected, strict=True):
                if not torch.equal(model(x), y):
                    wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def shared():
    model = nn.Sequential(conv(3, 8), *(nn.Sequential(conv(8, 8), nn.ReLU()) for _ in range(4)))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(8 * 64, 5))
    share(model)
    return model


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "save"])
def test_copies_and_pickles_of_a_model_with_sharing_and_an_engine(clone):
    model, host, engine = build(shared, "sparse")
    train(model, host, 3)
    x, _ = batch(9)
    expected = model.eval()(x)
    if clone == "save":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    else:
        twin = clone(model)
    torch.testing.assert_close(twin(x), expected)
    assert twin[0][2][0].weight is twin[0][3][0].weight
    engine.remove()
    torch.testing.assert_close(model(x), expected)
    assert hasattr(model[0][3][0], "scale")


def test_a_host_is_copied_without_its_engine():
    model, host, engine = build(Plain, "sparse")
    assert copy.copy(engine) is None and pickle.loads(pickle.dumps(engine)) is None
    assert host.engine is engine


def test_a_plain_checkpoint_in_a_sharing_network_is_told_of(caplog):
    caplog.set_level(logging.WARNING)
    plain = nn.Sequential(conv(3, 8), *(nn.Sequential(conv(8, 8), nn.ReLU()) for _ in range(4)))
    model = copy.deepcopy(plain)
    share(model)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 and not unexpected
    assert "not of a network that shares weights" in caplog.text
    x, _ = batch(0)
    torch.testing.assert_close(model(x.float()), model(x.float()))


# ---------------------------------------------------------------- export of wrapped models


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": averaged,
    "two of them": lambda model: nn.DataParallel(averaged(model)),
}
MASKS = {
    "booleans": lambda masks: masks,
    "floats": lambda masks: {name: mask.float() for name, mask in masks.items()},
    "wrapped names": lambda masks: {f"module.{name}": mask for name, mask in masks.items()},
    "bytes": lambda masks: {f"_orig_mod.module.{name}": mask.byte() for name, mask in masks.items()},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_exported_with_their_masks(wrapper, masks, tmp_path):
    model, host, _ = build(Plain, "dense", density=0.1)
    train(model, host, 2)
    given = MASKS[masks](host.masks)
    with torch.no_grad():
        model.stem.weight.fill_(3)  # where it is inactive too
    wrapped = WRAPPERS[wrapper](model)
    graph = trace(wrapped, given, SHAPE)
    assert sum(np.count_nonzero(n.weight) for n in graph.nodes if n.op == "conv") == host.nonzeros
    path = tmp_path / "net.safetensors"
    path.write_bytes(to_safetensors(wrapped, given))
    twin, found = load_sparse(path, Plain())
    assert found.keys() == host.masks.keys() and all(torch.equal(found[n], m) for n, m in host.masks.items())
    assert sum(int(twin.get_parameter(n).count_nonzero()) for n in found) == host.nonzeros


def test_a_tied_weight_has_its_mask_under_any_of_its_names(tmp_path):
    model = TiedWords()
    mask = torch.rand(11, 16) < 0.2
    for name in ("embed.weight", "decode.weight"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(to_safetensors(model, {name: mask}))
        twin, found = load_sparse(path, TiedWords())
        assert list(found) == ["embed.weight"] and torch.equal(found["embed.weight"], mask)
        assert twin.embed.weight is twin.decode.weight and not twin.decode.weight[~mask].any()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"stem.weigth": torch.ones(12, 3, 3, 3)}, "stem.weigth is no parameter of Plain"),
        ({"stem.weight": torch.ones(12, 3)}, r"stem.weight has shape \[12, 3\]"),
        ({"module.stem.weight": torch.full((12, 3, 3, 3), 0.5)}, "holds other numbers than 0 and 1"),
        ({"stem.weight": torch.ones(12, 3, 3, 3), "module.stem.weight": torch.zeros(12, 3, 3, 3)}, "another mask"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_line(masks, message):
    with pytest.raises(UsageError, match=message):
        trace(Plain(), masks, SHAPE)
    with pytest.raises(UsageError, match=message):
        to_safetensors(Plain(), masks)


def test_adam_on_weights_in_float16_is_one_line():
    """Zeros would become NaN: 0 / (sqrt(0) + eps), and eps is 0 there."""
    model = nn.Linear(20, 5).half()
    host = Masking(torch.optim.AdamW(model.parameters(), 1e-3))
    with pytest.raises(UsageError, match="eps=1e-08 makes NaN of inactive weights in float16"):
        host.add_module(model, density=0.3)
    model = nn.Linear(20, 5).half()
    host = Masking(torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-7), growth_mode="random", update_frequency=2)
    host.add_module(model, density=0.3)
    for _ in range(5):
        host.optimizer.zero_grad()
        model(torch.ones(4, 20).half()).square().mean().backward()
        host.step()
    assert model.weight.isfinite().all() and not model.weight[~host.masks["weight"]].any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("engine", [None, "dense", "sparse"])
def test_an_infinite_gradient_of_an_inactive_weight_leaves_nothing(engine, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    host = Masking(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), growth_mode="gradient", update_frequency=9)
    host.add_module(model, density=0.3)
    if engine:
        Engine(host, (3, 8, 8), engine)
    for step in range(8):
        host.optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).square().mean().backward()
        if step == 2:
            row, column = (~host.masks["4.weight"]).nonzero()[0]
            model[4].weight.grad[row, column] = value
        host.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(not weight[~host.masks[name]].any() for name, weight in host.weights.items())


def test_a_host_that_is_collected_in_the_middle_of_a_step_disturbs_nobody():
    model = nn.Linear(20, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    forgotten = []
    optimizer.register_step_pre_hook(lambda *_: forgotten.clear())
    for _ in range(3):
        forgotten.append(host_of(nn.Linear(8, 8)))
        model(torch.ones(2, 20)).sum().backward()
        optimizer.step()


def host_of(model):
    host = Masking(torch.optim.SGD(model.parameters(), 0.1))
    host.add_module(model, density=0.3)
    return host


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_two_thousand_updates_are_exact_and_take_no_memory(engine):
    """A soak: counts at every update, and memory at the end as after the first hundred."""
    resource = pytest.importorskip("resource")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    host = Masking(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), growth_mode="gradient", update_frequency=1)
    host.add_module(model, density=0.2)
    Engine(host, (3, 8, 8), engine)
    wanted, peaks = round(0.2 * host.theoretical_size), {}
    x = torch.randn(8, 3, 8, 8)
    for step in range(2001):
        host.optimizer.zero_grad()
        model(x).square().mean().backward()
        host.step()
        assert host.nonzeros == wanted == sum(int(mask.sum()) for mask in host.masks.values())
        assert not any(weight[~host.masks[name]].any() for name, weight in host.weights.items())
        peaks[step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peaks[2000] - peaks[100] < 8 * 1024  # KiB
