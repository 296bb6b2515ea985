"""On a CUDA device: no synchronisation between updates, the CPU's masks, CUDA graphs, torch.compile, state."""

import contextlib
import copy
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from east_plugins import Masking
from east_plugins.host.optimizer_state import state_tensors
from east_plugins.ops import fusion
from east_plugins.ops.fusion import fused
from east_plugins.options.sources import from_flags
from east_plugins.plugins.activation import dyrelu, factory
from east_plugins.plugins.activation.phased import PhaseOut, attach
from east_plugins.plugins.density import Cyclic
from east_plugins.sparse import Engine
from east_plugins.training import models, runs
from east_plugins.training.graphed import GraphedStep
from east_plugins.training.progress import Progress
from east_plugins.training.trainer import Interrupted, Trainer, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "cuda"
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True, capturable=True),
}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """TF32's rounding depends on the kernel that cuDNN takes for a shape."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(dtype=torch.float32, device=DEVICE):
    torch.manual_seed(0)
    return models.build("resnet18", 10, width=8).to(device, dtype)


def host_of(model, optimizer="sgd", density=0.02, **kwargs):
    kwargs = {"growth_mode": "gradient", "death_rate": 0.4, "redistribution_mode": "none", "seed": 0, **kwargs}
    host = Masking(OPTIMIZERS[optimizer](model.parameters()), **kwargs)
    host.add_module(model, density=density)
    return host


def batch(step=0, dtype=torch.float32, device=DEVICE):
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 3, 16, 16, generator=draw), torch.randint(10, (8,), generator=draw)
    return x.to(device, dtype), y.to(device)


def backward(model, host, x, y):
    host.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()


def check(host):
    """Books and masks agree; what is inactive is exactly zero."""
    for name, mask in host.masks.items():
        weight = host.weights[name]
        assert mask.is_cuda and int(mask.sum()) == host.name2nonzeros[name] >= 1
        for tensor in (weight, *state_tensors(host.optimizer, weight)):
            assert (tensor[~mask] == 0).all()


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_sees_a_synchronisation():
    with pytest.raises(RuntimeError), no_synchronisation():
        torch.ones(3, device=DEVICE).sum().item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.002, 0.3])
@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
def test_step_waits_for_nothing_between_updates(growth, density, optimizer):
    model = network()
    host = host_of(model, optimizer, density, growth_mode=growth, update_frequency=4)
    for step in range(12):
        x, y = batch(step)
        backward(model, host, x, y)
        guard = contextlib.nullcontext() if host.schedule.due(host.steps + 1) else no_synchronisation()
        with guard:
            host.step()
    check(host)


@pytest.mark.parametrize("redistribution", ["none", "momentum"])
@pytest.mark.parametrize("growth", ["gradient", "random", "momentum", "random_unfired"])
def test_an_update_waits_a_few_times_however_many_layers(growth, redistribution):
    model = network()
    host = host_of(model, growth_mode=growth, redistribution_mode=redistribution, update_frequency=None)
    for step in range(2):
        backward(model, host, *batch(step))
        host.step()
    backward(model, host, *batch(9))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            host.truncate_weights()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(host.masks) > 20
    assert 1 <= sum("synchroniz" in str(warning.message) for warning in caught) <= 6
    check(host)


def test_step_waits_for_nothing_while_an_activation_is_phased_out():
    model = network()
    phased = attach(model, factory("dyrelu-b"), (3, 16, 16), phase_out=PhaseOut(2, 6))
    host = host_of(model, update_frequency=None, plugins=[phased])
    for step in range(8):
        backward(model, host, *batch(step))
        with no_synchronisation():
            host.step()
    assert not phased.sites


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_training_step_with_an_engine_waits_for_nothing_once_planned(engine):
    model = network()
    host = host_of(model, update_frequency=None, density=0.01)
    Engine(host, (3, 16, 16), engine)
    for step in range(4):
        x, y = batch(step)
        guard = no_synchronisation() if step > 1 else contextlib.nullcontext()
        with guard:
            backward(model, host, x, y)
            host.step()
    check(host)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("death", ["magnitude", "random", "threshold"])
@pytest.mark.parametrize("growth", ["gradient", "random", "momentum", "random_unfired"])
def test_cpu_and_cuda_choose_the_same_masks(growth, death, deterministic):
    """The same gradients, computed on the CPU, through updates of rising and falling density."""
    schedule = Cyclic(0.02, multiplier=4, cycles=1, length=8, cyclic_frequency=1, frequency=2, end=99)
    hosts = {}
    for device in ("cpu", DEVICE):
        model = network(torch.float64, device)
        hosts[device] = host_of(model, growth_mode=growth, death_mode=death, schedule=schedule)
    for step in range(14):
        gradients = {}
        backward(hosts["cpu"].modules[0], hosts["cpu"], *batch(step, torch.float64, "cpu"))
        for name, parameter in hosts["cpu"].modules[0].named_parameters():
            gradients[name] = parameter.grad.clone()
        for name, parameter in hosts[DEVICE].modules[0].named_parameters():
            parameter.grad = gradients[name].to(DEVICE)
        for host in hosts.values():
            host.step()
        for name, mask in hosts["cpu"].masks.items():
            assert torch.equal(mask, hosts[DEVICE].masks[name].cpu()), (step, name)
    check(hosts[DEVICE])
    assert hosts["cpu"].name2nonzeros == hosts[DEVICE].name2nonzeros
    assert hosts["cpu"].num_remove == hosts[DEVICE].num_remove


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_cpu_and_cuda_train_alike(growth, deterministic):
    """Whole steps in float64 on either device, one update: the same masks, weights to rounding."""
    hosts = []
    for device in ("cpu", DEVICE):
        model = network(torch.float64, device)
        host = host_of(model, growth_mode=growth, update_frequency=2)
        for step in range(3):
            backward(model, host, *batch(step, torch.float64, device))
            host.step()
        hosts.append(host)
    for name, weight in hosts[0].weights.items():
        assert torch.equal(hosts[0].masks[name], hosts[1].masks[name].cpu())
        torch.testing.assert_close(weight, hosts[1].weights[name].cpu(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_inside_a_cuda_graph(optimizer, deterministic):
    """A captured training step does what the eager one does, and still does after a topology update."""
    plain, captured = network(), network()
    eager, graphed = (host_of(model, optimizer, update_frequency=None) for model in (plain, captured))
    x, y = batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: optimizer state and workspaces exist afterwards
        for _ in range(3):
            backward(captured, graphed, x, y)
            graphed.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graphed.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        F.cross_entropy(captured(x), y).backward()
        graphed.step()
    for _ in range(3):
        backward(plain, eager, x, y)
        eager.step()

    def both(steps):
        for _ in range(steps):
            graph.replay()
            backward(plain, eager, x, y)
            eager.step()
        for name, weight in eager.weights.items():
            torch.testing.assert_close(weight, graphed.weights[name])
            assert (graphed.weights[name][~graphed.masks[name]] == 0).all()

    both(4)
    graphed.load_state_dict(copy.deepcopy(eager.state_dict()))  # capturing counted a step, replays none
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the same weights and gradients: rounding must not choose the masks
        for name, weight in eager.weights.items():
            weight.grad = torch.randn(weight.shape, generator=draw).to(DEVICE)
            graphed.weights[name].copy_(weight)
            graphed.weights[name].grad.copy_(weight.grad)
    before = copy.deepcopy(eager.masks)
    for host in (eager, graphed):
        host.truncate_weights()
    assert any(not torch.equal(before[name], mask) for name, mask in eager.masks.items())
    for name, mask in eager.masks.items():
        assert torch.equal(mask, graphed.masks[name])
    both(4)


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="torch.compile needs a C compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_step_of_a_compiled_model(mode):
    plain, compiled = network(), network()
    hosts = [host_of(model, "sgd-fused", update_frequency=3) for model in (plain, compiled)]
    fast = torch.compile(compiled, mode=mode)
    for step in range(8):
        x, y = batch(step)
        backward(plain, hosts[0], x, y)
        hosts[1].optimizer.zero_grad()
        F.cross_entropy(fast(x), y).backward()
        for ours, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
            scale = float(ours.grad.abs().max()) + 1e-6
            assert float((ours.grad - theirs.grad).abs().max()) < 0.02 * scale
            theirs.grad.copy_(ours.grad)  # equal from here on: rounding must not choose the masks
        for host in hosts:
            host.step()
    for name, mask in hosts[0].masks.items():
        assert torch.equal(mask, hosts[1].masks[name])
    check(hosts[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam-fused"])
def test_state_goes_from_device_to_device(optimizer, tmp_path):
    """CPU to CUDA and back: masks, fired weights, running averages and optimizer state are the same."""
    make = {"sgd": OPTIMIZERS["sgd"], "adam-fused": lambda p: torch.optim.Adam(p, 0.01)}[optimizer]

    def build(device):
        model = network(torch.float64, device)
        host = Masking(make(model.parameters()), growth_mode="momentum", update_frequency=2, seed=3)
        host.add_module(model, density=0.03)
        return model, host

    def state(model, host):
        return {"model": model.state_dict(), "optimizer": host.optimizer.state_dict(), "host": host.state_dict()}

    first = build("cpu")
    for step in range(3):
        backward(*first, *batch(step, torch.float64, "cpu"))
        first[1].step()
    torch.save(state(*first), tmp_path / "0.pt")
    for i, device in enumerate((DEVICE, "cpu")):
        model, host = build(device)
        saved = torch.load(tmp_path / f"{i}.pt", map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        host.optimizer.load_state_dict(saved["optimizer"])
        host.load_state_dict(saved["host"])
        torch.save(state(model, host), tmp_path / f"{i + 1}.pt")
    start, end = (torch.load(tmp_path / f"{i}.pt", map_location="cpu", weights_only=True) for i in (0, 2))
    flat = [torch.utils._pytree.tree_leaves(part) for part in (start, end)]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for step in range(3, 6):  # and it trains on alike
        for trained in (first, (model, host)):
            backward(*trained, *batch(step, torch.float64, "cpu"))
            trained[1].step()
    for name, mask in first[1].masks.items():
        assert torch.equal(mask, host.masks[name])


def test_masks_follow_a_model_that_is_moved():
    model = network(device="cpu")
    host = host_of(model, update_frequency=2)
    model.to(DEVICE)
    for step in range(4):
        backward(model, host, *batch(step))
        host.step()
    check(host)


def test_graphed_steps_train_as_eager_ones(deterministic):
    """Through DyReLU's phases, two updates and a short batch; gradients are where rules and clipping look."""
    trained = []
    for graphed in (False, True):
        model = network(torch.float64)
        phased = attach(model, factory("dyrelu-b"), (3, 16, 16), phase_out=PhaseOut(6, 12))
        host = host_of(model, update_frequency=9, plugins=[phased])

        def gradients(x, y, model=model, host=host):
            host.optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return (loss.detach(),)

        step = GraphedStep(gradients, model.parameters, torch.device(DEVICE)) if graphed else gradients
        losses = []
        for i in range(22):
            x, y = batch(i, torch.float64)
            x, y = (x[:5], y[:5]) if i in (4, 10) else (x, y)
            losses.append(float(step(x, y, phased.phase)[0] if graphed else step(x, y)[0]))
            host.clip_grad_norm_(1.0, of="all")
            host.step()
        check(host)
        trained.append((host, losses))
    (eager, losses), (other, others) = trained
    assert others == pytest.approx(losses, rel=1e-9)
    for name, weight in eager.weights.items():
        assert torch.equal(eager.masks[name], other.masks[name])
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_lines_are_no_less_exact_than_single_operations(dtype):
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(8, 16, 12, 12, generator=draw).to(DEVICE, dtype) for _ in range(2))
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    lines = [torch.randn(8, 16, 1, 1, generator=draw).to(DEVICE, dtype) for _ in range(4)]
    for function, given in ((dyrelu._larger, (x, *lines)), (dyrelu._larger_backward, (grad, x, *lines))):
        with torch.no_grad():
            exact, plain, fast = function(*(t.double() for t in given)), function(*given), fused(function, *given)
        for true, one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (exact, plain, fast)), strict=True):
            assert other.dtype == dtype and other.shape == one.shape
            assert (other - true).norm() <= 1.01 * (one - true).norm() + 1e-6 * true.norm()
    assert not fusion._failed


@pytest.mark.parametrize(
    "flags", [{}, {"amp": True, "channels_last": True}, {"cuda_graph": True}], ids=["plain", "amp", "graph"]
)
def test_trainer_resumes_on_cuda(flags, tmp_path):
    pytest.importorskip("sklearn")
    options = from_flags(
        {"method": "east", "model": "resnet34", "width": 4, "density": 0.05, "epochs": 5, "limit": 200, **flags}
    )
    trainer = Trainer(options, tmp_path / "run")
    trainer.out.mkdir()
    runs.write_config(trainer.out, trainer.options)
    with Progress(trainer, quiet=True) as progress, pytest.raises(Interrupted):
        for pressed in (False, False, True):
            trainer.run_epoch(SimpleNamespace(pressed=pressed), progress)
    summary = train(options, trainer.out, resume=True, quiet=True)
    assert summary["nonzeros"] == round(0.05 * summary["maskable"])
    assert summary["epochs"] == 5 and summary["peak_memory_mib"] > 0


def test_norm_statistics_and_bfloat16_with_the_sparse_engine():
    model = network().to(memory_format=torch.channels_last)
    host = host_of(model, "sgd-fused", density=0.01, update_frequency=3)
    engine = Engine(host, (3, 16, 16), "sparse")
    for step in range(7):
        x, y = batch(step)
        host.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        loss.backward()
        host.step()
        assert torch.isfinite(loss)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not engine.dense and all(torch.isfinite(norm.running_var).all() for norm in norms)
    check(host)
