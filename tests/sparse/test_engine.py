"""The sparse engine against the dense computation: the same trajectories, and dense where it cannot follow."""

import copy
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.ops.paths import effective_density
from east_plugins.plugins.activation import PhaseOut, attach, factory
from east_plugins.plugins.density import Constant, Cyclic, OneShot
from east_plugins.plugins.transform.dct import convert
from east_plugins.plugins.transform.sharing import share
from east_plugins.sparse import Engine, kernel
from east_plugins.sparse.layers import LayerPlan
from east_plugins.training import models

SHAPE = (3, 8, 8)


def batch(step, dtype, size=24):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (size,), generator=generator)


def build(
    engine, model=None, *, optimizer="sgd", density=0.02, shared=False, dyrelu=False, schedule=None,
    dtype=torch.float64, init="connected", growth="gradient", frequency=20, keep_connected=True,
    **kwargs,
):  # fmt: skip
    torch.manual_seed(0)
    model = (models.build("resnet20", 10, image_size=8, width=8) if model is None else model()).to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.bias, std=0.3)  # constants of exactly 0 would leave a ReLU's side to rounding
    if shared:
        share(model)
    phased = attach(model, factory("dyrelu-b"), SHAPE, phase_out=PhaseOut(40, 110)) if dyrelu else None
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    host = Masking(
        optimizer, death_rate=0.5, growth_mode=growth, schedule=schedule, update_frequency=frequency, seed=0,
        keep_connected=keep_connected, plugins=[phased] if phased else [], **kwargs,
    )  # fmt: skip
    host.add_module(model, density=density, sparse_init=init, input_shape=SHAPE, weight_init="sparse-fan-in")
    return model, host, Engine(host, SHAPE, engine)


def train(model, host, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step, next(model.parameters()).dtype)
        host.optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        host.step()
        losses.append(loss.item())
    return losses


def assert_same(dense, sparse, tolerance=1e-9):
    (ours, host, _), (theirs, reference, _) = sparse, dense
    for name, mask in reference.masks.items():
        assert torch.equal(host.masks[name], mask)
    assert host.nonzeros == reference.nonzeros
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


CYCLE = dict(multiplier=3, cycles=2, length=40, cyclic_frequency=10, frequency=20)
RUNS = {
    "plain": {},
    "very sparse": dict(density=0.008),
    "adam": dict(optimizer="adam"),
    "shared": dict(shared=True),
    "dyrelu": dict(dyrelu=True),
    "cyclic": dict(density=0.1, init="ERK", schedule=Cyclic(0.1, **CYCLE)),
    "everything": dict(density=0.1, init="ERK", schedule=Cyclic(0.1, **CYCLE), dyrelu=True, shared=True),
    "random growth": dict(growth="random"),
    "global": dict(prune_scope="global"),
}


@pytest.mark.parametrize("options", [
    pytest.param(options, id=name, marks=() if name in ("plain", "adam", "everything") else pytest.mark.slow)
    for name, options in RUNS.items()
])  # fmt: skip
def test_200_steps_with_10_updates_are_those_of_the_dense_engine(options, caplog):
    dense, sparse = build("dense", **options), build("sparse", **options)
    expected, losses = train(*dense[:2], 200), train(*sparse[:2], 200)
    assert losses == pytest.approx(expected, abs=1e-9) and not sparse[2].dense
    assert "all channels" not in caplog.text
    assert_same(dense, sparse)
    model, (x, _) = sparse[0].eval(), batch(999, torch.float64)
    torch.testing.assert_close(model(x), dense[0].eval()(x))


def test_masks_with_weights_off_path():
    """Where active weights read constants, the dense computation amplifies its own rounding a thousandfold in ten
    steps (reversing the order of the images does it), so that few steps can be compared."""
    dense, sparse = (
        build(engine, density=0.004, init="ERK", keep_connected=False, frequency=None) for engine in ("dense", "sparse")
    )
    assert train(*sparse[:2], 15) == pytest.approx(train(*dense[:2], 15), abs=1e-9)
    assert_same(dense, sparse, 1e-7)


def test_float32_losses_agree_over_50_steps():
    dense, sparse = (build(engine, dtype=torch.float32, frequency=None) for engine in ("dense", "sparse"))
    assert train(*sparse[:2], 50) == pytest.approx(train(*dense[:2], 50), abs=1e-3)


def test_dead_channels_keep_exact_statistics_and_norm_gradients():
    dense, sparse = (build(engine, density=0.003, frequency=None) for engine in ("dense", "sparse"))
    for model, host, _ in (dense, sparse):
        train(model, host, 3)
        x, y = batch(7, torch.float64)
        host.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    assert_same(dense, sparse)
    for ours, theirs in zip(sparse[0].modules(), dense[0].modules(), strict=True):
        if isinstance(ours, nn.BatchNorm2d):
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
            torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
            assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 4


def test_weight_gradients_are_dense_tensors_of_active_values():
    dense, sparse = build("dense", frequency=None), build("sparse", frequency=None)
    for model, host, _ in (dense, sparse):
        host.optimizer.zero_grad()
        for step in (0, 1):  # accumulated
            x, y = batch(step, torch.float64)
            F.cross_entropy(model(x), y).backward()
    for name, mask in sparse[1].masks.items():
        grad = sparse[1].weights[name].grad
        torch.testing.assert_close(grad, dense[1].weights[name].grad * mask)
    with pytest.raises(UsageError, match="masked by step"):
        sparse[1].truncate_weights()


GRADIENTS = {
    "plain": {},
    "off path": dict(init="ERK", density=0.01, keep_connected=False),
    "shared": dict(shared=True),
    "dyrelu": dict(dyrelu=True),
    "dyrelu, shared, off path": dict(dyrelu=True, shared=True, init="ERK", density=0.01, keep_connected=False),
    "vgg": dict(model=lambda: models.build("vgg16", 10, image_size=8, width=8), density=0.05),
    "bottlenecks": dict(model=lambda: models.build("resnet50", 10, image_size=8, width=8), density=0.05),
}


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in GRADIENTS.items()])
def test_dense_gradients_before_an_update_come_from_the_sparse_pass(options, caplog):
    caplog.set_level(logging.INFO)
    dense, (ours, sparse, engine) = (build(engine, frequency=1, **options) for engine in ("dense", "sparse"))
    model, host, _ = dense
    x, y = batch(3, torch.float64)
    for network, masking in ((model, host), (ours, sparse)):
        for _ in range(2):  # accumulated
            F.cross_entropy(network(x), y).backward()
        assert masking.dense_gradient_next
    for name, weight in host.weights.items():
        wanted = weight.grad
        atol = 1e-11 * float(wanted.abs().max())
        torch.testing.assert_close(engine.dense_gradients()[name], wanted, rtol=1e-9, atol=atol)
        torch.testing.assert_close(sparse.weights[name].grad, wanted * host.masks[name], rtol=1e-9, atol=atol)
        assert host.masks[name].all() or bool((wanted[~host.masks[name]] != 0).any())
    masked = {id(weight) for weight in sparse.weights.values()}
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        if id(a) not in masked:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert "is dense" not in caplog.text and "all channels" not in caplog.text


def test_dense_gradients_of_networks_that_cannot_be_split_come_from_a_dense_pass(caplog):
    caplog.set_level(logging.INFO)
    dense, sparse = (build(engine, Concatenated, density=0.04, frequency=1) for engine in ("dense", "sparse"))
    x, y = batch(3, torch.float64)
    for model, _, _ in (dense, sparse):
        F.cross_entropy(model(x), y).backward()
    gradients = sparse[2].dense_gradients()
    for (name, a), b in zip(sparse[0].named_parameters(), dense[0].parameters(), strict=True):
        torch.testing.assert_close(gradients.get(name, a.grad), b.grad)
        torch.testing.assert_close(a.grad, b.grad * sparse[1].masks.get(name, 1))
    assert "the step before this update is dense" in caplog.text


def test_gradients_that_somebody_wrote_to_do_not_leak_into_the_next_step():
    dense, sparse = build("dense", frequency=20), build("sparse", frequency=20)
    for model, host, _ in (dense, sparse):
        for step in range(30):
            host.optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            F.cross_entropy(model(x), y).backward()
            if step % 3 == 0:
                for weight in host.weights.values():
                    weight.grad.add_(0.01)
            host.step()
    assert_same(dense, sparse)


class Concatenated(nn.Module):
    """Concatenation, groups, biases, pooling, a one-dimensional norm, flattening of several pixels."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 12, 3, padding=2, dilation=2), nn.BatchNorm2d(12), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(28, 28, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(28), nn.GELU())
        self.d = nn.Sequential(nn.Flatten(), nn.Linear(28 * 4, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU())
        self.e = nn.Linear(40, 10)

    def forward(self, x):
        a = self.a(x)
        x = F.max_pool2d(torch.cat([a, self.b(a)], 1), 2)
        return F.log_softmax(self.e(self.d(self.c(x))), 1)


class Normed(nn.Module):
    """A norm over channels: what is left out would change what is kept."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.fc = nn.GroupNorm(4, 16), nn.Linear(16, 10)

    def forward(self, x):  # of the 16 channels few are touched at this density
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.fc((x.softmax(1) * x).mean((2, 3)))


@pytest.mark.parametrize("network", [Concatenated, Normed])
def test_other_networks(network, caplog):
    dense, sparse = (build(engine, network, density=0.04) for engine in ("dense", "sparse"))
    assert train(*sparse[:2], 60) == pytest.approx(train(*dense[:2], 60), abs=1e-9)
    assert not sparse[2].dense
    assert_same(dense, sparse)
    assert ("all channels are computed" in caplog.text) == (network is Normed)


@pytest.mark.parametrize("name", ["vgg16", "wrn-10-2", "mlp", "resnet50"])
def test_families_of_networks(name):
    def network():
        return models.build(name, 10, image_size=8, **({} if name == "mlp" else {"width": 8}))

    dense, sparse = (build(engine, network, density=0.05, frequency=8) for engine in ("dense", "sparse"))
    assert train(*sparse[:2], 12) == pytest.approx(train(*dense[:2], 12), abs=1e-9)
    assert_same(dense, sparse, 1e-8)


# ------------------------------------------------------------------ dense where it must be


def test_rules_that_need_momentum_and_dct_layers_stay_dense(caplog):
    caplog.set_level(logging.INFO)
    assert "dense gradient at every step" in build("auto", growth="momentum")[2].reason

    def network():
        model = models.build("resnet20", 10, image_size=8, width=8)
        convert(model)
        return model

    assert "in its own way" in build("auto", network)[2].reason
    assert caplog.text.count("the engine is dense") == 2
    assert build("dense")[2].dense


def test_many_processes_stay_dense(monkeypatch):
    monkeypatch.setattr("east_plugins.ops.distributed.active", lambda: True)
    monkeypatch.setattr("east_plugins.ops.distributed.from_rank_0", lambda value: value)
    assert "DistributedDataParallel" in build("auto")[2].reason


def test_an_unknown_engine_is_refused():
    with pytest.raises(UsageError, match="`engine` must be one of auto, dense, sparse, got 'fast'"):
        build("fast")


def test_copies_and_pickles_compute_with_their_own_weights():
    model, host, _ = build("sparse")
    train(model, host, 3)
    x, _ = batch(5, torch.float64)
    expected = model.eval()(x)
    other = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (other, torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
        with torch.no_grad():
            twin.fc.weight.fill_(1)  # at inactive positions too
        assert not torch.allclose(twin(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_a_loaded_checkpoint_of_other_masks_is_computed_densely(caplog):
    model, host, _ = build("sparse")
    other, _, _ = build("dense", density=0.5)
    train(model, host, 2)
    model.load_state_dict(other.state_dict())
    x, _ = batch(5, torch.float64)
    torch.testing.assert_close(model.eval()(x), other.eval()(x))
    assert "masks do not know" in caplog.text


def test_analysis_and_removal():
    model, host, engine = build("sparse", init="connected")
    plain, reference, _ = build("dense", init="connected")
    train(model, host, 3)
    train(plain, reference, 3)
    assert effective_density(model, host.masks, SHAPE) == effective_density(plain, reference.masks, SHAPE) > 0
    engine.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not model._forward_hooks and not model._forward_pre_hooks and host.engine is None
    assert vars(model.conv1).keys() == vars(plain.conv1).keys()
    train(model, host, 25, first=3)
    train(plain, reference, 25, first=3)
    assert_same((plain, reference, None), (model, host, None))


def test_a_model_that_nobody_holds_is_gone():
    """Autograd keeps a weight's hooks where Python's collector does not see them."""
    model, host, engine = build("sparse")
    train(model, host, 3)
    gone = [weakref.ref(each) for each in (model, host, engine, model.conv1)]
    del model, host, engine
    gc.collect()
    assert [each() for each in gone] == [None] * 4


def test_autocast_compile_and_no_grad(caplog):
    model, host, _ = build("sparse", dtype=torch.float32, frequency=None)
    plain, reference, _ = build("dense", dtype=torch.float32, frequency=None)
    x, y = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = F.cross_entropy(model(x), y), F.cross_entropy(plain(x), y)
    loss.backward()
    host.step()
    assert loss.item() == pytest.approx(expected.item(), abs=0.1)
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    assert "dense" not in caplog.text


@pytest.mark.slow
def test_under_torch_compile():
    model, host, _ = build("sparse", dtype=torch.float32)
    plain, reference, _ = build("dense", dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        x, y = batch(step, torch.float32)
        for network, owner in ((compiled, host), (plain, reference)):
            owner.optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            owner.step()
    assert_same((plain, reference, None), (model, host, None), 1e-5)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(kernel, "load", lambda dtype: None)
    dense, sparse = build("dense"), build("sparse")
    assert train(*sparse[:2], 45) == pytest.approx(train(*dense[:2], 45), abs=1e-9)
    assert_same(dense, sparse)


# ------------------------------------------------------------------ auto


def test_auto_changes_nothing_but_the_speed_and_can_be_resumed(caplog):
    caplog.set_level(logging.WARNING)
    dense, auto = build("dense"), build("auto")
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    assert train(*auto[:2], 30) == pytest.approx(train(*dense[:2], 30), abs=1e-9)
    assert_same(dense, auto)
    assert torch.equal(torch.get_rng_state(), drawn) and not caplog.records
    state = auto[2].state_dict()
    assert len(state["seconds"]) >= 2
    other = build("auto")[2]
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize("faster", ["dense", "sparse"])
def test_auto_takes_the_faster(monkeypatch, faster, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {"dense": 1.0, "sparse": 1.0, faster: 0.5}
    monkeypatch.setattr(Engine, "_measure", lambda self, x, plans: seconds["dense" if plans is None else "sparse"])
    model, host, engine = build("auto", frequency=None)
    train(model, host, 2)
    calls, call = [], LayerPlan.__call__
    monkeypatch.setattr(LayerPlan, "__call__", lambda self, x: calls.append(self) or call(self, x))
    train(model, host, 1, first=2)
    assert bool(calls) == (faster == "sparse")
    assert all(engine.holds_gradient(name) for name in host.masks)  # of active values, whichever computed it


def test_auto_chooses_alike_ever_after(monkeypatch, tmp_path):
    """The clock does not repeat itself; what a process has measured is the machine's from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    states = []
    for dense, sparse in [(1.0, 2.0), (2.0, 1.0)]:
        monkeypatch.setattr(Engine, "_measure", lambda *of, at=(dense, sparse): at[of[2] is not None])
        model, host, engine = build("auto", frequency=None)
        train(model, host, 1)
        states.append(engine.state_dict())
    assert states[0] == states[1] and sorted(seconds for _, seconds in states[0]["seconds"]) == [1.0, 2.0]
    for file in tmp_path.glob("east_plugins/times/*"):
        file.write_text("damaged")
    model, host, engine = build("auto", frequency=None)
    train(model, host, 1)
    assert len(engine.state_dict()["seconds"]) == 2  # measured anew


def test_updates_in_a_constant_schedule_get_their_dense_gradient():
    model, host, engine = build("sparse", schedule=Constant(0.02, 3))
    train(model, host, 2)
    assert all(engine.holds_gradient(name) for name in host.masks)
    train(model, host, 1, first=2)
    assert not any(engine.holds_gradient(name) for name in host.masks)


def test_rounding_that_a_norm_blows_up_is_no_disagreement(caplog):
    """Statistics that take large, equal parts away, as those of channels that never varied do."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(72, 5)
    )
    nn.init.constant_(model[0].bias, 1e6)
    model[1].running_mean.fill_(1e6)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="gradient", seed=0)
    host.add_module(model, density=0.4)
    engine = Engine(host, (3, 16, 16), "sparse")
    model(torch.randn(2, 3, 16, 16))
    assert not engine.dense and "channels" not in caplog.text


def test_a_constant_at_the_kink_of_a_relu_is_no_disagreement(caplog):
    """Active weights that read constants feed norms whose shift is zero at first: whether a gradient passes the ReLU is
    a matter of rounding, and is no reason to be dense for good."""
    torch.manual_seed(0)
    model = models.build("resnet34", 10, image_size=16, width=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    host = Masking.of("rigl", model, optimizer, density=0.001, steps=1000, input_shape=(3, 16, 16))
    engine = Engine(host, (3, 16, 16), "sparse")
    model(torch.randn(4, 3, 16, 16))
    assert not engine.dense and "channels" not in caplog.text


def test_plans_are_compared_where_layers_are_in_a_new_state_and_ever_more_rarely_else(monkeypatch):
    def compared(engine, steps, **kwargs):
        found, run = [], engine._check.agrees
        monkeypatch.setattr(engine._check, "agrees", lambda *a, **k: found.append(host.steps) or run(*a, **k))
        train(model, host, steps, **kwargs)
        return found

    model, host, engine = build("sparse", frequency=1, growth="random")
    once = compared(engine, 40)
    assert 5 < len(once) < 20  # of 40 topologies

    model, host, engine = build("sparse", density=0.01, schedule=OneShot(0.01, stop=5, end=8))
    assert 5 in compared(engine, 8)  # channels fall away for the first time


def test_clipping_scales_layers_that_are_not_masked_too():
    norms = []
    for choice in ("dense", "sparse"):
        torch.manual_seed(0)
        model = models.build("resnet20", 5, 3, 8, 4).double()
        host = Masking(torch.optim.SGD(model.parameters(), 0.05), growth_mode="random", update_frequency=None)
        host.add_module(model, density=0.2, sparse_init="connected", input_shape=(3, 8, 8), exclude=["conv1"])
        engine = Engine(host, (3, 8, 8), choice)
        assert engine.dense == (choice == "dense") and "conv1.weight" not in host.masks
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        host.clip_grad_norm_(0.1)
        norms.append(float(host.gradient_norm()))
    assert norms == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.parametrize("of", ["active", "all"])
def test_clipping_by_either_norm_is_that_of_the_dense_engine(of):
    """With sharing and DyReLU, 50 steps, 10 updates, float64."""
    networks = {}
    for choice in ("dense", "sparse"):
        torch.manual_seed(0)
        model = models.build("resnet20", 5, 3, 8, 4).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        host = Masking.of(
            "rigl+connected+share+dyrelu", model, optimizer, density=0.05, steps=50, input_shape=(3, 8, 8),
            update_frequency=5, lr_drops=[0.9],
        )  # fmt: skip
        host.reads_dense_gradients = of == "all"
        engine = Engine(host, (3, 8, 8), choice)
        generator, norms = torch.Generator().manual_seed(1), []
        for _ in range(50):
            x = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
            y = torch.randint(5, (16,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            norms.append(float(host.clip_grad_norm_(0.5, of=of)))
            assert engine.dense or all(map(engine.masks_gradient, host.masks)), "no step pays for dense gradients"
            host.step()
        assert engine.dense == (choice == "dense")
        networks[choice] = model.state_dict(), host.masks, norms
    (weights, masks, norms), (others, other_masks, other_norms) = networks["dense"], networks["sparse"]
    assert max(norms) > 0.5
    assert other_norms == pytest.approx(norms, rel=1e-9)
    for name, mask in masks.items():
        assert torch.equal(other_masks[name], mask)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-9, atol=1e-9)
