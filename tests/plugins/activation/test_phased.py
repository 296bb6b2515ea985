import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from east_plugins.errors import NothingMatchedError, UsageError
from east_plugins.plugins.activation import PhasedActivations, PhaseOut, attach, factory

dyrelu_b = factory("b")


class Block(nn.Module):
    """One nn.ReLU called twice with different channels beside a functional ReLU, as in torchvision's Bottleneck."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.relu(self.conv2(out)))


class Net(nn.Module):
    """Every way to call ReLU, nested, with batch norm, dropout and a projection head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 6), Block(8, 4))
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.blocks(self.stem(x)).mul(2))
        x = self.drop(x.mean((2, 3)))
        x = self.fc1(x).relu()
        return self.fc2(x)


class PreAct(nn.Module):
    """In-place ReLUs whose result is ignored: later readers of `x` see the activated values."""

    def __init__(self, call):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.call = call

    def forward(self, x):
        x = self.conv(x)
        {"module": self.relu, "function": F.relu_, "torch": torch.relu_, "method": Tensor_relu_}[self.call](x)
        return x


def Tensor_relu_(x):
    x.relu_()


SHAPE = (3, 8, 8)
CHANNELS = [8, 6, 8, 8, 4, 8, 8, 8, 12]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def channels(phased):
    return sorted(site.act.squeeze.in_features for site in phased.sites)


def marker(scale):
    """An activation that shows in the output which one ran."""

    class Marker(nn.Module):
        def __init__(self, num_channels):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return x * self.scale

    return Marker


# ---------------------------------------------------------------- finding


def test_one_activation_for_every_call(net):
    assert channels(attach(net, dyrelu_b, SHAPE)) == sorted(CHANNELS)


@pytest.mark.parametrize("call", ["module", "function", "torch", "method"])
def test_in_place_calls_write_the_activation_back(call, x):
    net = PreAct(call)
    expected = net.conv(x) * 3
    phased = attach(net, marker(3.0), SHAPE)
    out = net(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert phased.sites[0].act.scale.grad is not None and net.conv.weight.grad is not None


def test_attaching_changes_neither_parameters_nor_statistics_nor_random_state(net):
    net.train()
    net.blocks[0].bn1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    modules, random_state = list(net.modules()), torch.get_rng_state()
    attach(net, dyrelu_b, SHAPE)
    assert torch.equal(random_state, torch.get_rng_state())
    assert [m.training for m in modules] == modes
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_initial_values_follow_the_generator(net):
    def values(seed):
        model = copy.deepcopy(net)
        phased = attach(model, dyrelu_b, SHAPE, generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in phased.parameters()])

    assert torch.equal(values(1), values(1))
    assert not torch.equal(values(1), values(2))


def test_relu_of_a_vector_is_no_activation():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return F.relu(x) * F.relu(self.weights).sum()

    assert len(attach(Weighted(), factory("swish"), (4,)).sites) == 1


class ReLUSequential(nn.Sequential):
    def forward(self, x):
        return F.relu(super().forward(x))


def test_sequential_models_and_their_subclasses(x):
    net = nn.Sequential(ReLUSequential(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        expected = net[3](net[2](net[0][0](x) * 3 * 3))
    attach(net, marker(3.0), SHAPE)
    torch.testing.assert_close(net(x), expected)
    assert len(net) == 4 and isinstance(net[-1], nn.Linear)
    assert net[:1](x).shape == (4, 4, 6, 6)


def test_relus_called_only_in_training_are_found():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 7)
            self.stem = nn.Linear(3, 4)

        def forward(self, x):
            x = self.stem(x)
            extra = F.relu(self.fc(x)).sum() if self.training else 0
            return x + extra

    assert channels(attach(Auxiliary().eval(), dyrelu_b, (3,))) == [7]


def test_model_without_relu_is_refused_and_unchanged():
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    with pytest.raises(NothingMatchedError, match="`east_dyrelu`"):
        attach(net, dyrelu_b, (3,))
    assert type(net) is nn.Sequential


def test_attaching_twice_is_refused(net):
    attach(net, dyrelu_b, SHAPE)
    with pytest.raises(UsageError, match="already"):
        attach(net, dyrelu_b, SHAPE)


def test_a_factory_that_fails_leaves_the_model_unchanged(net):
    keys = list(net.state_dict())
    with pytest.raises(UsageError, match="`reduction`"):
        attach(net, factory("b", reduction=0), SHAPE)
    assert type(net) is Net and list(net.state_dict()) == keys


# ---------------------------------------------------------------- computing


@pytest.mark.parametrize("kind", "abc")
def test_at_beta_1_every_relu_is_the_activation_exactly(kind, x):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    phased = attach(net, factory(kind), SHAPE)
    (site,) = phased.sites
    x = x.double()
    assert torch.equal(net(x), net[2](site.act(net[0](x))))


def test_blend_is_the_formula(x):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).double()
    phased = attach(net, dyrelu_b, SHAPE)
    x = x.double()
    hidden = net[0](x)
    for beta in (0.75, 0.3):
        phased.set_beta(beta)
        expected = beta * phased.sites[0].act(hidden) + (1 - beta) * hidden.relu()
        torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
    with pytest.raises(UsageError, match="beta"):
        phased.set_beta(1.5)


def test_calls_are_counted_anew_after_a_pass_that_broke_off(net, x):
    attach(net, dyrelu_b, SHAPE)
    expected = net(x)
    net.blocks[0].relu(torch.randn(1, 6, 2, 2))
    with pytest.raises(RuntimeError):
        net.blocks[0](torch.randn(1, 7, 8, 8))
    assert torch.equal(net(x), expected)


class Recomputing(nn.Sequential):
    """Blocks that keep no intermediate values for the backward pass."""

    def forward(self, x):
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_recomputation_in_backward_meets_the_same_activations(net, x):
    attach(net, dyrelu_b, SHAPE)
    net(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net.blocks = Recomputing(*net.blocks)
    net(x).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_autocast(net, x):
    phased = attach(net, dyrelu_b, SHAPE)
    for beta in (1, 0.5, 0):
        phased.set_beta(beta)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        out.float().sum().backward()


# ---------------------------------------------------------------- phasing out


@pytest.mark.parametrize("step, beta", [(0, 1), (10, 1), (11, 0.9), (15, 0.5), (19, 0.1), (20, 0), (10**9, 0)])
def test_beta_over_steps(step, beta):
    assert PhaseOut(10, 20).beta(step) == pytest.approx(beta, abs=1e-15)
    assert (PhaseOut(10, 20).beta(step) == 0) == (beta == 0)


def test_equal_start_and_end_switch_at_once():
    assert [PhaseOut(3, 3).beta(step) for step in range(5)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("start, end", [(5, 4), (-1, 4), (0, 0)])
def test_an_end_before_the_start_is_refused(start, end):
    with pytest.raises(UsageError, match="`end` .*`start`"):
        PhaseOut(start, end)


class Relus(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (F.relu, torch.relu, torch.Tensor.relu)
        return func(*args, **(kwargs or {}))


def test_at_beta_0_the_models_own_relus_run(net, x):
    expected = net(x)
    phased = attach(net, dyrelu_b, SHAPE)
    assert not torch.equal(net(x), expected)
    phased.set_beta(0)
    with Relus() as relus:
        assert torch.equal(net(x), expected)
    assert relus.count == len(CHANNELS)


def test_removal_leaves_the_plain_network_and_nothing_else(net, x):
    expected, keys, text = net(x), list(net.state_dict()), repr(net)
    contents = [(type(m), set(vars(m))) for m in net.modules()]
    phased = attach(net, dyrelu_b, SHAPE)
    optimizer = torch.optim.Adam(net.parameters())
    net(x).sum().backward()
    optimizer.step()
    phased.remove(optimizer)
    phased.remove(optimizer)
    assert list(net.state_dict()) == keys and repr(net) == text and not phased.sites
    assert [(type(m), set(vars(m))) for m in net.modules()] == contents
    assert optimizer.param_groups[0]["params"] == list(net.parameters())
    assert set(optimizer.state) == set(net.parameters())
    assert net(x).shape == expected.shape


def test_after_removal_outputs_equal_the_same_network_with_relu(net, x):
    plain = copy.deepcopy(net)
    phased = attach(net, dyrelu_b, SHAPE)
    phased.set_beta(0.5)
    net(x)
    phased.remove()
    assert torch.equal(net(x), plain(x))


class Host:
    """What a plugin needs of a host."""

    def __init__(self, optimizer, plugin):
        self.optimizer, self.plugin, self.steps = optimizer, plugin, 0

    def step(self):
        self.optimizer.step()
        self.steps += 1
        self.plugin(self)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    ],
    ids=["LambdaLR", "MultiStepLR"],
)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        lambda net: torch.optim.Adam([{"params": net.stem.parameters()}, {"params": net.blocks.parameters()}], 0.1),
        lambda net: torch.optim.AdamW(net.named_parameters(), 0.1),
    ],
    ids=["SGD", "groups", "named"],
)
def test_joining_an_optimizer_that_has_an_lr_scheduler(net, x, optimizer, scheduler):
    optimizer = optimizer(net)
    scheduler = scheduler(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    phased = attach(net, dyrelu_b, SHAPE, phase_out=PhaseOut(1, 4))
    phased.join(optimizer)
    phased.join(optimizer)
    new = phased.parameters()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(sizes) + len(new)
    host, before = Host(optimizer, phased), [p.detach().clone() for p in new]
    betas = []
    for _ in range(5):
        betas.append(phased.beta)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        host.step()
        scheduler.step()
    assert betas == [1, 1, pytest.approx(2 / 3), pytest.approx(1 / 3), 0]
    assert any(not torch.equal(old, p) for old, p in zip(before, new, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert not set(optimizer.state) & set(new)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_activations_that_start_late_join_an_optimizer_with_momentum(net, x, fused):
    """`torch._fused_sgd_` takes momentum of all parameters or of none."""
    phased = attach(net, dyrelu_b, SHAPE, phase_out=PhaseOut(2, 6), late=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, fused=fused)
    host, new = Host(optimizer, phased), phased.parameters()
    for step in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in new) == (step < 3)
        expected = [p.detach() - 0.01 * p.grad for p in new if p.grad is not None]  # momentum begins with the gradient
        host.step()
    for parameter, each in zip(new, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), each)


def test_joining_an_optimizer_of_another_model_is_refused(net):
    phased = attach(net, dyrelu_b, SHAPE)
    with pytest.raises(UsageError, match="no parameter of the model"):
        phased.join(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


# ---------------------------------------------------------------- copying and saving


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: through_pickle(net)], ids=["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_weights(net, x, clone):
    attach(net, dyrelu_b, SHAPE)
    other = clone(net)
    assert torch.equal(other(x), net(x))
    expected = net(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(net(x), expected)
    assert other(x).abs().max() == 0
    assert not {id(m) for m in net.modules()} & {id(m) for m in other.modules()}
    PhasedActivations(other).remove()
    assert type(other) is Net and torch.equal(net(x), expected)


def through_pickle(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("beta", [1, 0.25, 0])
def test_a_state_dict_brings_back_the_phase(net, x, beta):
    other = copy.deepcopy(net)
    phased = attach(net, dyrelu_b, SHAPE)
    phased.set_beta(beta)
    attach(other, dyrelu_b, SHAPE, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(other(x), net(x))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), net(x))


def test_moves_reach_the_activations(net, x):
    phased = attach(net, dyrelu_b, SHAPE)
    phased.set_beta(0.5)
    assert net.double()(x.double()).dtype == torch.float64
    assert net.to("meta")(x.double().to("meta")).shape == (4, 5)


@pytest.fixture
def small():
    """Few operations, since compiling takes long; a module that calls ReLU inside one that calls ReLU."""
    torch.compiler.reset()
    return ReLUSequential(nn.Conv2d(3, 4, 3), Block(4, 2)).eval()


def test_compiled_three_times_at_most_while_beta_changes(small, x):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    phased = attach(small, dyrelu_b, SHAPE)
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    for beta in (1, 1, 0.75, 0.5, 0.25, 0.1, 0, 0):
        phased.set_beta(beta)
        torch.testing.assert_close(compiled(x), small(x))
    assert len(graphs) == 3
    phased.remove()
    torch.testing.assert_close(compiled(x), small(x))


def test_compiled_forward_and_backward(small, x):
    attach(small, dyrelu_b, SHAPE).set_beta(0.5)
    compiled = torch.compile(small, backend="aot_eager")
    small(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    compiled(x).sum().backward()
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(net, x, process_group):
    phased = attach(net, dyrelu_b, SHAPE)
    parallel = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    for beta in (1, 0.5, 0):
        phased.set_beta(beta)
        parallel(x).sum().backward()
    phased.remove()
    for _ in range(2):
        parallel(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
