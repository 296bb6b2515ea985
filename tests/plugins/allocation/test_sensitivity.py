import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.ops.paths import on_path
from east_plugins.plugins.allocation.saliency import SynFlow, keep_highest, synaptic_flow
from east_plugins.plugins.allocation.sample import LossOfWeights, Sample
from east_plugins.plugins.allocation.sensitivity import Force, Grasp, IterSnip, Snip
from east_plugins.training import models

BY_LOSS = ["snip", "grasp", "force", "iter_snip"]


def network():
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def data(batches=3, size=8, shape=(4,), classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, *shape, generator=generator, dtype=dtype), torch.arange(size) % classes)
        for _ in range(batches)
    ]


def names(model):
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def scored(rule, model, batches, total=20):
    loss = LossOfWeights(model, names(model), Sample(batches))
    with loss.ready():
        return rule.scored(loss, total, torch.Generator().manual_seed(0))


def test_snip_scores_are_finite_differences_of_gates():
    model, batches = network(), data()
    _, scores = scored(Snip(batches=2), model, batches)
    step = 1e-6
    for name in names(model):
        weight = model.get_parameter(name)
        for i in range(weight.numel()):
            losses = []
            for gate in (1 + step, 1 - step):
                other = copy.deepcopy(model)
                other.get_parameter(name).data.view(-1)[i] *= gate
                losses.append(sum(F.cross_entropy(other(x), y) for x, y in batches[:2]) / 2)
            slope = (losses[0] - losses[1]) / (2 * step)
            assert scores[name].view(-1)[i].item() == pytest.approx(abs(slope.item()), rel=1e-6, abs=1e-9)


def test_grasp_scores_are_those_of_an_explicit_hessian():
    model, batches = network(), data(batches=2, size=9)
    rule = Grasp(per_class=5, temperature=3.0)
    _, scores = scored(rule, model, batches)
    x = torch.cat([batches[0][0], batches[1][0][:6]])  # five of each of the classes 0, 1, 2 as they come
    y = torch.cat([batches[0][1], batches[1][1][:6]])
    weights = {name: model.get_parameter(name).detach() for name in names(model)}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = {n: p.view_as(weights[n]) for n, p in zip(weights, flat.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)) / 3.0, y)

    flat = torch.cat([weight.flatten() for weight in weights.values()])
    hessian, gradient = torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat)
    expected = (flat * (hessian @ gradient)).split(sizes)
    for name, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(scores[name].flatten(), want, rtol=1e-9, atol=1e-15)


def test_force_and_iterative_snip_of_one_round_are_snip():
    model, batches = network(), data()
    masks, scores = scored(Snip(), model, batches)
    for rule in (Force(rounds=1), IterSnip(rounds=1)):
        others, other_scores = scored(rule, model, batches)
        assert all(torch.equal(masks[name], others[name]) for name in masks)
        assert all(torch.equal(scores[name], other_scores[name]) for name in masks)


@pytest.mark.parametrize("resurrect", [True, False])
def test_the_rounds_are_those_computed_directly_and_pruned_weights_come_back_in_force_only(resurrect):
    model, batches, rounds, total = network(), data(batches=4), 4, 12
    parameters = {name: model.get_parameter(name) for name in names(model)}
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    back, size = 0, sum(p.numel() for p in parameters.values())
    for turn in range(rounds):
        pruned = copy.deepcopy(model)
        for name in mask:
            pruned.get_parameter(name).data *= mask[name]
        F.cross_entropy(pruned(batches[turn][0]), batches[turn][1]).backward()
        score = {n: (p.detach() * pruned.get_parameter(n).grad).abs() for n, p in parameters.items()}
        flat = torch.cat([score[n].masked_fill(~mask[n] & (not resurrect), -1).flatten() for n in mask])
        for first, layer in zip((0, 20, 50), flat.split([20, 30, 18]), strict=True):
            flat[first + int(layer.argmax())] = torch.inf  # every layer keeps its best
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(round(size * (total / size) ** ((turn + 1) / rounds))).indices] = True
        now = {n: part.view_as(mask[n]) for n, part in zip(mask, kept.split([20, 30, 18]), strict=True)}
        back += sum(int((now[n] & ~mask[n]).sum()) for n in mask)
        mask = now
    masks, _ = scored((Force if resurrect else IterSnip)(rounds=rounds), model, batches, total)
    assert all(torch.equal(masks[name], mask[name]) for name in mask)
    assert (back > 0) == resurrect


def test_synaptic_flow_is_conserved():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3))
    weights = {name: model.get_parameter(name).detach().abs().double() for name in names(model)}
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in weights.items()}
    scores = synaptic_flow(model, weights, masks, (2, 6, 6))
    scores = {name: score * masks[name] for name, score in scores.items()}
    # through every layer goes all of R, and into a channel as much as out of it (Tanaka et al. 2020, Theorems 1 and 2)
    total = [score.sum().item() for score in scores.values()]
    assert total == pytest.approx([total[0]] * 3, rel=1e-12)
    into, out = scores["0.weight"].sum((1, 2, 3)), scores["2.weight"].sum((0, 2, 3))
    torch.testing.assert_close(into, out, rtol=1e-12, atol=0)


def test_equal_scores_are_drawn_and_scores_that_are_no_number_come_last():
    masks = {"a": torch.ones(50, dtype=torch.bool), "b": torch.ones(50, dtype=torch.bool)}
    scores = [torch.zeros(50), torch.full((50,), torch.nan)]
    kept = keep_highest(masks, scores, 31, torch.Generator().manual_seed(0))
    assert (int(kept["a"].sum()), int(kept["b"].sum())) == (30, 1)
    assert kept["a"][:30].sum() < 30


@pytest.mark.parametrize("method", BY_LOSS)
def test_counts_are_exact_every_layer_keeps_a_weight_and_the_model_is_left_as_it_was(method):
    model = models.build("resnet20", 10, 1, 8, 8)
    loader = data(shape=(1, 8, 8), classes=10, size=20, dtype=torch.float32)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings = {"sparse_init_rounds": 5} if method in ("force", "iter_snip") else {}
    host = Masking.of(method, model, optimizer, density=0.01, steps=100, batches=loader, **settings)
    assert host.nonzeros == round(0.01 * host.theoretical_size) == sum(int(m.sum()) for m in host.masks.values())
    assert min(host.name2nonzeros.values()) >= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        mask = host.masks.get(name)
        assert torch.equal(value, before[name] if mask is None else before[name] * mask)
    drawn = dict(host.name2nonzeros)
    host.truncate_weights()
    assert host.name2nonzeros == drawn  # the scores gave the layers their shares


@pytest.mark.parametrize("method", [*BY_LOSS, "synflow"])
def test_connected_brings_every_weight_onto_a_path_and_keeps_the_layers_counts(method):
    shape, hosts = (1, 8, 8), []
    for name in (method, f"{method}+connected"):
        torch.manual_seed(0)
        model = models.build("resnet20", 10, 1, 8, 8)
        loader = data(shape=shape, classes=10, size=20, dtype=torch.float32)
        settings = {"density": 0.02, "input_shape": shape, "batches": loader}
        settings |= {"sparse_init_rounds": 20} if method in ("force", "iter_snip", "synflow") else {}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        hosts.append(Masking.of(name, model, optimizer, steps=100, **settings))
    alone, connected = hosts
    assert alone.name2nonzeros == connected.name2nonzeros
    before, after = (on_path(host.modules[0], host.masks, shape) for host in hosts)
    assert sum(int(each.sum()) for each in after.values()) >= 0.99 * connected.nonzeros
    assert sum(int(each.sum()) for each in before.values()) < sum(int(each.sum()) for each in after.values())
    kept = sum(int((alone.masks[name] & connected.masks[name]).sum()) for name in alone.masks)
    assert kept > 0.8 * alone.nonzeros  # what lay on a path has stayed


def test_tied_weights_recurrent_layers_and_a_loss_of_ones_own_are_scored():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Linear(6, 6, bias=False), nn.LSTM(6, 6, batch_first=True)
            self.out = nn.Linear(6, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.rnn(self.embed(x))[0])

    model = Sequence()
    x, y = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    F.mse_loss(model(x), y).backward()
    expected = {n: (p * p.grad).abs().detach() for n, p in model.named_parameters() if p.dim() == 2}
    model.zero_grad()
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="random")
    host.add_module(model, density=0.3, sparse_init="snip", batches=[(x, y)], loss=F.mse_loss)
    for name, score in expected.items():
        mask = host.masks[name]
        for part, active in zip(score.chunk(len(score) // 6), mask.chunk(len(score) // 6), strict=True):
            assert active.any()  # every gate has a budget of its own
            assert not (~active).any() or part[active].max() == part.max()


def test_what_cannot_be_is_one_clear_line():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def start(**settings):
        return Masking.of("force", model, optimizer, density=0.2, steps=10, **settings)

    with pytest.raises(UsageError, match="`sparse_init` force looks at the loss on training data.*`batches`"):
        start()
    with pytest.raises(UsageError, match="`batches` gave no batch; allowed is what can be gone through again"):
        start(batches=iter(data()))
    with pytest.raises(UsageError, match="pairs of inputs and targets"):
        start(batches=[torch.zeros(3)])
    with pytest.raises(UsageError, match="`sparse_init_rounds` must be over 0"):
        start(batches=data(), sparse_init_rounds=0)
    with pytest.raises(UsageError, match="needs add_module.*input_shape"):
        Masking.of("snip+connected", model, optimizer, density=0.2, steps=10, batches=data())
    grasp = {"density": 0.2, "steps": 10, "loss": F.mse_loss}
    with pytest.raises(UsageError, match="targets must be one class number an example"):
        Masking.of("grasp", model, optimizer, batches=[(torch.zeros(4, 4).double(), torch.zeros(4, 3))], **grasp)
    with pytest.raises(UsageError, match="the model must give .images, classes."):
        Masking.of("grasp", model, optimizer, batches=[(torch.zeros(2, 4, 4).double(), torch.zeros(2, 4, 3))], **grasp)
    with pytest.raises(UsageError, match="`rounds` must be at least 1"):
        SynFlow(rounds=0)
