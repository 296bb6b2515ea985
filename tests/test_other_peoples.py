"""The host in code that its authors never saw: other networks, optimizers, loops.

Right means: weights as those of a dense network that is masked after every step (float64, 20 steps, two updates),
exact counts, the same parameter objects; or one line that says what was met.
"""

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from east_plugins import Masking, UsageError
from east_plugins.plugins.density import Gradual

STEPS, EVERY = 20, 7  # two updates, and steps after each

SGD = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)


class Net(nn.Module):
    """Convolutions, a norm and a head."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def batch(step):
    draw = torch.Generator().manual_seed(1000 + step)
    return torch.randn(6, 3, 6, 6, generator=draw).double(), torch.randint(5, (6,), generator=draw)


def built(model=None):
    torch.manual_seed(3)  # Net's values are the same every time
    return (Net() if model is None else model).double()


def host_of(model, optimizer=None, density=0.2, growth_mode="gradient", add=None, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), **SGD)
    host = Masking(
        optimizer, growth_mode=growth_mode, death_rate=0.4, **{"update_frequency": EVERY, "seed": 0, **kwargs}
    )
    host.add_module(model, density=density, **(add or {}))
    return host


def backward(model, step, loss=None):
    x, y = batch(step)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y) if loss is None else loss(model, x, y)
    loss.backward()


def state_of(optimizer, weight):
    return [v for v in optimizer.state.get(weight, {}).values() if torch.is_tensor(v) and v.shape == weight.shape]


def masked_(model, optimizers, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            for tensor in (weight, *(each for o in optimizers for each in state_of(o, weight))):
                tensor.mul_(mask)


def clones(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def check(host, model, total=None):
    """Books are exact and nothing is nonzero outside of the masks."""
    assert sum(int(mask.sum()) for mask in host.masks.values()) == host.nonzeros
    assert total is None or host.nonzeros == total
    for name, mask in host.masks.items():
        weight = model.get_parameter(name)
        assert host.weights[name] is weight and not weight[~mask].any(), name
        for tensor in state_of(host.optimizer, weight):
            assert not tensor[~mask].any(), name


def assert_same(model, reference, tolerance=1e-9):
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= tolerance, name


class Reference:
    """The same network trained densely, masked after every step by the masks of a host."""

    def __init__(self, model, host, optimizer=None):
        self.model = copy.deepcopy(model)
        self.optimizers = [(optimizer or (lambda p: torch.optim.SGD(p, **SGD)))(self.model.parameters())]
        self.host, self.masks = host, clones(host.masks)

    def step(self, step, loss=None, before=None):
        """To be called after the host's: takes its masks over."""
        backward(self.model, step, loss)
        if before is not None:
            before(self)
        for optimizer in self.optimizers:
            optimizer.step()
        self.follow()

    def follow(self):
        for masks in (self.masks, self.host.masks):
            masked_(self.model, self.optimizers, masks)
        self.masks = clones(self.host.masks)


def check_beside_reference(host, model, nonzeros):
    """Trained, the network has `nonzeros` active weights and equals the reference after every step."""
    reference = Reference(model, host)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model, nonzeros)
        assert_same(model, reference.model)


# ---------------------------------------------------------------------- weights that somebody else writes


def by_load_state_dict(model, dense):
    model.load_state_dict(dense)


def by_copy(model, dense):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[name])


def by_new_data(model, dense):
    for name, parameter in model.named_parameters():
        parameter.data = dense[name].clone()


def by_copy_into_data(model, dense):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[name])


def by_numpy(model, dense):
    for name, parameter in model.named_parameters():
        parameter.detach().numpy()[...] = dense[name].numpy()


def by_one_layer(model, dense):
    with torch.no_grad():
        model.conv2.weight.lerp_(dense["conv2.weight"], 0.3)


WRITERS = [by_load_state_dict, by_copy, by_new_data, by_copy_into_data, by_numpy, by_one_layer]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("at", [3, EVERY], ids=["between updates", "after an update"])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("write", WRITERS)
def test_weights_that_somebody_writes_are_masked_at_the_next_step(write, optimizer, density, at):
    model = built()
    dense = {name: torch.randn_like(value) * 0.1 if value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    host = host_of(model, OPTIMIZERS[optimizer](model.parameters()), density)
    total, reference = host.nonzeros, Reference(model, host, OPTIMIZERS[optimizer])
    for step in range(STEPS):
        if step == at:
            write(model, dense)
            write(reference.model, dense)
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model, total)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_averaged_weights_may_be_swapped_in_and_out(density):
    """As EMA implementations do around an evaluation: the average has weights where masks once were."""
    model = built()
    host = host_of(model, density=density)
    reference, average = Reference(model, host), copy.deepcopy(model)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step)
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
        if step % 3 == 0:
            kept = [p.detach().clone() for p in model.parameters()]
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                p.data.copy_(a.data)
            model(batch(0)[0])
            reference.model(batch(0)[0])
            for k, p in zip(kept, model.parameters(), strict=True):
                p.data.copy_(k)
        check(host, model)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dense_optimizer_state_may_be_loaded(optimizer, density):
    model = built()
    make = OPTIMIZERS[optimizer]
    other = make(model.parameters())
    for step in range(3):
        backward(model, step)
        other.step()
    state = copy.deepcopy(other.state_dict())
    host = host_of(model, make(model.parameters()), density)
    reference = Reference(model, host, make)
    for step in range(STEPS):
        if step == 4:
            host.optimizer.load_state_dict(copy.deepcopy(state))
            reference.optimizers[0].load_state_dict(copy.deepcopy(state))
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_masks_that_a_script_writes_hold_from_the_next_step_on(density):
    model = built()
    host = host_of(model, density=density, update_frequency=None)
    reference = Reference(model, host)
    for step in range(8):
        if step == 3:  # as ITOP's scripts do
            host.masks["conv2.weight"][:] = torch.rand(12, 12, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.1
            host.masks["fc.weight"] = (torch.arange(60).view(5, 12) % 3 == 0).float()
            reference.masks = clones(host.masks)
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)
    assert host.name2nonzeros["fc.weight"] == 20


# ---------------------------------------------------------------------- steps that are not the host's


def framework_step(host, model, step):
    backward(model, step)
    host.optimizer.step()


def framework_closure(host, model, step):
    def closure():
        backward(model, step)
        return torch.tensor(0.0)

    host.optimizer.step(closure)


def framework_scaler(host, model, step):
    backward(model, step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(host.optimizer)
    scaler.update()


def framework_scheduled(host, model, step):
    """A learning-rate scheduler wraps the optimizer's step."""
    if step == 0:
        host.scheduler = torch.optim.lr_scheduler.LambdaLR(host.optimizer, lambda _: 1.0)
    backward(model, step)
    host.optimizer.step()
    host.scheduler.step()


def framework_by_turns(host, model, step):
    backward(model, step)
    host.step() if step % 2 else host.optimizer.step()


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
@pytest.mark.parametrize(
    "step_of", [framework_step, framework_closure, framework_scaler, framework_scheduled, framework_by_turns]
)
def test_a_framework_that_steps_the_optimizer_steps_the_host(step_of, growth, density):
    models = [built(Net(norm=False)) for _ in range(2)]  # norms of constants make noise of gradients that are 0
    models[1].load_state_dict(models[0].state_dict())
    hosts = [host_of(model, density=density, growth_mode=growth) for model in models]
    reference = Reference(models[0], hosts[0])
    first = clones(hosts[0].masks)
    for step in range(STEPS):
        step_of(hosts[0], models[0], step)
        backward(models[1], step)
        hosts[1].step()
        reference.step(step)
        check(hosts[0], models[0], hosts[1].nonzeros)
        assert_same(models[0], reference.model)
        assert_same(*models)
        assert all(torch.equal(mask, hosts[1].masks[name]) for name, mask in hosts[0].masks.items())
    assert hosts[0].steps == STEPS and any(not torch.equal(first[name], mask) for name, mask in hosts[0].masks.items())


@pytest.mark.parametrize("order", ["optimizer first", "host first"])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_both_steps_for_the_same_gradients_are_refused(order, density):
    model = built()
    host = host_of(model, density=density)
    calls = [host.optimizer.step, host.step]
    backward(model, 0)
    first, second = calls if order == "optimizer first" else calls[::-1]
    first()
    with pytest.raises(UsageError, match="call one of them"):
        second()
    check(host, model)


def test_a_warm_up_by_the_optimizer_is_no_second_step():
    model = built()
    host = host_of(model)
    for step in range(4):
        backward(model, step)
        host.optimizer.step() if step < 2 else host.step()
    check(host, model)


def muon(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01)


SECOND = {
    "adam of the head": lambda model: torch.optim.Adam(model.fc.parameters(), lr=0.01),
    "muon of the matrices": muon,
    "adagrad of the second convolution": lambda model: torch.optim.Adagrad([model.conv2.weight], lr=0.01),
}


@pytest.mark.parametrize("host_first", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("second", SECOND)
def test_weights_in_a_second_optimizer_are_masked_after_its_steps(second, density, host_first):
    model = built()
    other = SECOND[second](model)
    mine = {id(p) for group in other.param_groups for p in group["params"]}
    first = torch.optim.SGD([p for p in model.parameters() if id(p) not in mine], **SGD)
    host = host_of(model, first, density)
    reference = Reference(model, host)
    other_reference = SECOND[second](reference.model)
    mine = {id(p) for group in other_reference.param_groups for p in group["params"]}
    pair = [torch.optim.SGD([p for p in reference.model.parameters() if id(p) not in mine], **SGD), other_reference]
    reference.optimizers = pair
    for step in range(STEPS):
        backward(model, step)
        backward(reference.model, step)
        for turn in ("host", "other") if host_first else ("other", "host"):
            if turn == "host":
                host.step()
                pair[0].step()
            else:
                other.step()
                pair[1].step()
            reference.follow()
            check(host, model)
            assert not any(state[~host.masks[n]].any() for n, w in host.weights.items() for state in state_of(other, w))
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize(
    "new", [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.02), OPTIMIZERS["sgd"]],
    ids=["adamw", "sgd", "another of the same"],
)  # fmt: skip
def test_another_optimizer_may_be_set(new, density):
    model = built()
    host = host_of(model, density=density)
    reference = Reference(model, host)
    for step in range(STEPS):
        if step == 9:
            host.optimizer = new(model.parameters())
            reference.optimizers = [new(reference.model.parameters())]
        backward(model, step)
        host.step()
        reference.step(step)
        check(host, model)
        assert_same(model, reference.model)


def test_the_optimizer_of_another_model_cannot_be_set():
    model = built()
    host = host_of(model)
    before = host.optimizer
    with pytest.raises(UsageError, match="another model"):
        host.optimizer = torch.optim.SGD(built().parameters(), 0.1)
    assert host.optimizer is before


# ---------------------------------------------------------------------- weights that are not trained


def probe(model):
    """A linear probe: the head alone is trained."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)


def one_layer(model):
    model.conv1.weight.requires_grad_(False)


def all_but_norms_and_second(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "conv2" in name)


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
@pytest.mark.parametrize("freeze", [probe, one_layer, all_but_norms_and_second])
def test_frozen_weights_are_left_as_they_are(freeze, growth):
    model = built()
    freeze(model)
    before = copy.deepcopy(model.state_dict())
    host = host_of(model, growth_mode=growth)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    matrices = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    assert set(host.masks) == matrices
    size = sum(model.get_parameter(name).numel() for name in matrices)
    assert host.theoretical_size == size
    check_beside_reference(host, model, round(0.2 * size))
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in frozen)


def test_a_frozen_torchvision_backbone_is_left_as_it_is():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.requires_grad_(False)
    model.fc = nn.Linear(512, 10)
    before = copy.deepcopy(model.state_dict())
    model.eval()  # a linear probe
    host = host_of(model, torch.optim.AdamW(model.fc.parameters(), 1e-3), density=0.1, update_frequency=2)
    for step in range(4):
        model.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.tensor([1, 7])).backward()
        host.step()
    check(host, model, 512)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "fc" not in name)


def test_weights_unfrozen_later_are_told_of_once(caplog):
    model = built()
    one_layer(model)
    host = host_of(model)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            if step == 2:
                model.conv1.weight.requires_grad_(True)
            backward(model, step)
            host.step()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "conv1.weight" in message and "stay dense" in message


@pytest.mark.parametrize("rule", ["gradient", "momentum", "random"])
@pytest.mark.parametrize("frozen_later", [False, True])
def test_layers_that_get_no_gradient_stay(rule, frozen_later):
    model = built()
    model.unused = nn.Linear(8, 8).double()
    host = host_of(model, growth_mode=rule)
    if frozen_later:
        model.conv1.requires_grad_(False)
    before = clones(host.masks)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        check(host, model)
    still = {"unused.weight", *(["conv1.weight"] if frozen_later else [])}
    if rule != "random" or frozen_later:
        names = still if rule != "random" else still - {"unused.weight"}
        assert all(torch.equal(before[name], host.masks[name]) for name in names)
    assert not torch.equal(before["conv2.weight"], host.masks["conv2.weight"])


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("fc", {"fc.weight"}),
        ("fc.weight", {"fc.weight"}),
        (["conv*"], {"conv1.weight", "conv2.weight"}),
        (lambda m: m.conv1, {"conv1.weight"}),
        (lambda m: [m.conv2, "fc"], {"conv2.weight", "fc.weight"}),
        (nn.Linear, {"fc.weight"}),
        ([nn.Linear, "*1.weight"], {"fc.weight", "conv1.weight"}),
    ],
)
def test_what_is_excluded_is_left_dense(exclude, left):
    model = built()
    before = copy.deepcopy(model.state_dict())
    kind = isinstance(exclude, type) or not callable(exclude)
    host = host_of(model, add={"exclude": exclude if kind else exclude(model)})
    assert set(host.masks) == {"conv1.weight", "conv2.weight", "fc.weight"} - left
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in left)
    size = sum(weight.numel() for weight in host.weights.values())
    assert host.theoretical_size == size and host.nonzeros == round(0.2 * size)


def test_an_exclude_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match="matches no module.*did you mean conv1"):
        host_of(built(), add={"exclude": "conv11"})


# ---------------------------------------------------------------------- weights that are computed from others


def with_new_spectral_norm(model):
    parametrizations.spectral_norm(model.conv2)
    return "conv2.parametrizations.weight.original"


def with_old_spectral_norm(model):
    torch.nn.utils.spectral_norm(model.fc)
    return "fc.weight_orig"


def with_two_spectral_norms(model):
    parametrizations.spectral_norm(model.conv1, n_power_iterations=2)
    return "conv1.parametrizations.weight.original"


@pytest.mark.parametrize("apply", [with_new_spectral_norm, with_old_spectral_norm, with_two_spectral_norms])
def test_spectral_norm_keeps_zeros_where_the_original_has_them(apply):
    model = Net()
    name = apply(model)
    model = built(model)
    host = host_of(model)
    assert name in host.masks and len(host.masks) == 3
    layer = model.get_submodule(name.split(".")[0])
    check_beside_reference(host, model, round(0.2 * host.theoretical_size))
    model(batch(0)[0])
    assert torch.equal(layer.weight != 0, model.get_parameter(name) != 0)


def old_weight_norm(model):
    torch.nn.utils.weight_norm(model.conv2)


def new_weight_norm(model):
    parametrizations.weight_norm(model.conv2)


def orthogonal(model):
    parametrizations.orthogonal(model.conv2)


def pruned(model):
    prune.l1_unstructured(model.conv2, "weight", amount=0.5)


def of_a_script(model):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight + weight.transpose(0, 1)

    nn.utils.parametrize.register_parametrization(model.conv2, "weight", Symmetric())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("apply", [old_weight_norm, new_weight_norm, orthogonal, pruned, of_a_script])
def test_weights_computed_in_other_ways_are_refused_in_one_line_and_may_be_left_dense(apply):
    model = Net()
    apply(model)
    model = built(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"layer conv2 \(.*exclude='conv2'") as error:
        host_of(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    host = host_of(model, add={"exclude": "conv2"})
    assert set(host.masks) == {"conv1.weight", "fc.weight"}
    for step in range(3):
        backward(model, step)
        host.step()
    check(host, model)


# ---------------------------------------------------------------------- recurrent layers, attention, embeddings


class Sequences(nn.Module):
    """Reads the images' rows as a sequence, with some layer in the middle."""

    def __init__(self, layer, features):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 5)

    def forward(self, x):
        x = x.transpose(1, 2).flatten(2)  # [N, 6, 18]
        if isinstance(self.layer, nn.MultiheadAttention):
            x = self.layer(x, x, x)[0]
        elif isinstance(self.layer, nn.RNNBase):
            x = self.layer(x)[0]
        elif isinstance(self.layer, nn.RNNCellBase):
            state = None
            for i in range(x.shape[1]):
                state = self.layer(x[:, i], state)
            x = (state[0] if isinstance(state, tuple) else state)[:, None]
        elif isinstance(self.layer, nn.Bilinear):
            x = self.layer(x, x.flip(1))
        elif isinstance(self.layer, nn.Embedding):
            x = self.layer((x * 10).long().clamp(-20, 19) + 20).mean(2)
        else:
            x = self.layer(x)
        return self.head(x.mean(1))


LAYERS = {  # the layer, its outputs, and in how many blocks each matrix that ITOP masks falls
    "lstm": (
        lambda: nn.LSTM(18, 8, 2, batch_first=True), 8,
        {f"weight_{k}_l{i}": 4 for k in ("ih", "hh") for i in (0, 1)},
    ),
    "lstm with projection": (
        lambda: nn.LSTM(18, 8, batch_first=True, proj_size=4, bidirectional=True), 8,
        {f"weight_{k}_l0{r}": b for k, b in (("ih", 4), ("hh", 4), ("hr", 1)) for r in ("", "_reverse")},
    ),
    "gru": (lambda: nn.GRU(18, 8, batch_first=True), 8, {"weight_ih_l0": 3, "weight_hh_l0": 3}),
    "rnn": (lambda: nn.RNN(18, 8, batch_first=True), 8, {"weight_ih_l0": 1, "weight_hh_l0": 1}),
    "lstm cell": (lambda: nn.LSTMCell(18, 8), 8, {"weight_ih": 4, "weight_hh": 4}),
    "gru cell": (lambda: nn.GRUCell(18, 8), 8, {"weight_ih": 3, "weight_hh": 3}),
    "attention": (
        lambda: nn.MultiheadAttention(18, 3, batch_first=True), 18, {"in_proj_weight": 3, "out_proj.weight": 1},
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(18, 3, kdim=18, vdim=18, batch_first=True), 18,
        {"in_proj_weight": 3, "out_proj.weight": 1},
    ),
    "bilinear": (lambda: nn.Bilinear(18, 18, 4), 4, {"weight": 1}),
    "embedding": (lambda: nn.Embedding(40, 8), 8, {"weight": 1}),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(18, 3, 24, dropout=0.0, batch_first=True), 18,
        {"self_attn.in_proj_weight": 3, "self_attn.out_proj.weight": 1, "linear1.weight": 1, "linear2.weight": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("growth", ["gradient", "momentum", "momentum_neuron", "random_unfired"])
@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_of_other_layers_are_masked_block_by_block(kind, growth):
    make, features, blocks = LAYERS[kind]
    torch.manual_seed(1)
    model = Sequences(make(), features).double()
    host = host_of(model, growth_mode=growth, density=0.2)
    assert set(host.masks) == {"head.weight", *(f"layer.{name}" for name in blocks)}
    size = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1)
    assert host.theoretical_size == size
    counts = {name: [int(part.sum()) for part in host.masks[f"layer.{name}"].chunk(n)] for name, n in blocks.items()}
    assert all(count >= 1 for each in counts.values() for count in each)
    assert all(max(each) - min(each) <= 1 for each in counts.values()), "gates are of one size"
    first = clones(host.masks)
    check_beside_reference(host, model, round(0.2 * size))
    after = {name: [int(part.sum()) for part in host.masks[f"layer.{name}"].chunk(n)] for name, n in blocks.items()}
    assert after == counts
    assert any(not torch.equal(first[name], mask) for name, mask in host.masks.items())


def test_attention_with_weights_of_their_own_for_q_k_and_v():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=6, vdim=4), "h": nn.Linear(8, 2)})
    host = host_of(model)
    assert set(host.masks) == {"a.q_proj_weight", "a.k_proj_weight", "a.v_proj_weight", "a.out_proj.weight", "h.weight"}


def test_a_tied_embedding_is_masked_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "decoder": nn.Linear(8, 30, bias=False)})
    model["decoder"].weight = model["embedding"].weight
    host = host_of(model, density=0.2)
    assert set(host.masks) == {"embedding.weight"} and host.theoretical_size == 480 and host.nonzeros == 96


def test_connectivity_says_what_it_cannot_follow():
    for more in (
        {"sparse_init": "connected", "input_shape": (3, 6, 6)},
        {"sparse_init": "SynFlow", "input_shape": (3, 6, 6)},
    ):
        model = Sequences(nn.LSTM(18, 8, batch_first=True), 8).double()
        with pytest.raises(UsageError, match="weight_ih_l0.*ERK, ER, uniform"):
            host_of(model, add=more)
    model = Sequences(nn.LSTM(18, 8, batch_first=True), 8).double()
    host_of(model, add={"sparse_init": "ERK", "exclude": "layer"})


class OwnMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(10, 18))
        self.head = nn.Linear(10, 5)


@pytest.mark.parametrize(
    "model, share",
    [
        (lambda: OwnMatrix(), "78.3 %"),
        (lambda: nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)), "76.9 %"),
        (lambda: nn.ModuleList([nn.Linear(3, 3), nn.ParameterList([torch.randn(9, 9)])]), "90.0 %"),
    ],
)
def test_matrices_of_no_known_layer_are_told_of_once_with_their_share(model, share, caplog):
    with caplog.at_level(logging.WARNING):
        host_of(model(), density=0.5)
    (record,) = caplog.records
    assert share in record.getMessage() and "left dense" in record.getMessage()


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_torchvision_transformers_have_all_their_matrices_masked(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
    from east_plugins.host.choice import choose

    chosen, _ = choose(model)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    size = sum(p.numel() for p in matrices.values())
    assert sum(each.weight.numel() for each in chosen.values()) > 0.99 * size


# ---------------------------------------------------------------------- readers of gradients


def clip(of, norm):
    def before(reference):
        grads = {}
        for name, p in reference.model.named_parameters():
            mask = reference.masks.get(name) if of == "active" else None
            grads[name] = p.grad if mask is None else p.grad * mask
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, norm) for g in grads.values()]), norm)
        for p in reference.model.parameters():
            p.grad.mul_((0.05 / (total + 1e-6)).clamp(max=1.0))
        reference.norm = total

    return before


@pytest.mark.parametrize("norm", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("of", ["active", "all"])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_gradients_are_clipped_by_the_norm_that_is_asked_for(density, of, norm):
    model = built()
    host = host_of(model, density=density)
    reference = Reference(model, host)
    for step in range(STEPS):
        backward(model, step)
        found = host.clip_grad_norm_(0.05, of=of, norm_type=norm)
        host.step()
        reference.step(step, before=clip(of, norm))
        assert abs(found - reference.norm) < 1e-9
        assert_same(model, reference.model)


def test_without_an_engine_gradients_are_the_dense_ones_until_the_step():
    model = built()
    host = host_of(model, density=0.05)
    reference = Reference(model, host)
    for step in range(STEPS):
        backward(model, step)
        backward(reference.model, step)
        for ours, theirs in zip(model.parameters(), reference.model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        host.step()
        reference.step(step)


def test_another_kind_of_norm_is_refused():
    host = host_of(built())
    with pytest.raises(UsageError, match="of must be one of active, all"):
        host.clip_grad_norm_(1.0, of="dense")


# ---------------------------------------------------------------------- mixed precision


def unscaled(host, scaler, model):
    scaler.unscale_(host.optimizer)


def unscaled_and_clipped(host, scaler, model):
    scaler.unscale_(host.optimizer)
    host.clip_grad_norm_(0.05, of="all")


def clipped_by_torch(host, scaler, model):
    scaler.unscale_(host.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize("between", [unscaled, unscaled_and_clipped, clipped_by_torch, lambda *_: None])
def test_gradients_may_be_unscaled_before_the_step(between):
    model = built()
    host = host_of(model)
    reference = Reference(model, host)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    clips = clip("all", 2.0) if between in (unscaled_and_clipped, clipped_by_torch) else None
    for step in range(STEPS):
        backward(model, step, lambda m, x, y: scaler.scale(F.cross_entropy(m(x), y)))
        between(host, scaler, model)
        host.step(scaler=scaler)
        scaler.update()
        reference.step(step, before=clips)
        check(host, model)
        assert_same(model, reference.model)


# ---------------------------------------------------------------------- optimizers and states of other kinds


class Lars(torch.optim.SGD):
    """Like LARS: the learning rate follows norms of whole tensors."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.norm() / (p.grad.norm() + 1e-3 * p.norm() + 1e-9))
        return super().step(closure)


class Centred(torch.optim.AdamW):
    """Gradient centralisation."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    p.grad.sub_(p.grad.mean(tuple(range(1, p.dim())), keepdim=True))
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Writes where gradients are zero too."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.linspace(0, 1e-3, p.numel(), dtype=p.dtype).view_as(p))
        return loss


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("cls, options", [(Lars, SGD), (Centred, {"lr": 0.01}), (Noisy, SGD)])
def test_unknown_subclasses_are_stepped_as_they_are_and_masked(cls, options, density):
    """On masked gradients: what such an optimizer computes of the whole tensor is that of the sparse one."""
    model = built()
    host = host_of(model, cls(model.parameters(), **options), density)
    reference = Reference(model, host, lambda p: cls(p, **options))

    def masked(reference):
        for name, mask in reference.masks.items():
            reference.model.get_parameter(name).grad.mul_(mask)

    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step, before=masked)
        check(host, model)
        assert_same(model, reference.model)


@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9),
])  # fmt: skip
def test_learning_rates_may_be_tensors(make, density):
    model = built()
    host = host_of(model, make(model.parameters()), density)
    reference = Reference(model, host, make)
    for step in range(STEPS):
        backward(model, step)
        host.step()
        reference.step(step)
        assert_same(model, reference.model)


def pickled(model, host):
    return pickle.loads(pickle.dumps((model, host)))


def copied(model, host):
    return copy.deepcopy((model, host))


def pickled_with_its_model_inside(model, host):
    other = pickle.loads(pickle.dumps(host))
    return other.modules[0], other


@pytest.mark.parametrize("again", [pickled, copied, pickled_with_its_model_inside])
@pytest.mark.parametrize("density", [0.05, 0.4], ids=["packed", "dense"])
def test_a_host_is_pickled_and_copied(density, again):
    model = built()
    host = host_of(model, density=density, growth_mode="momentum")
    for step in range(STEPS):
        if step == 9:
            other, twin = again(model, host)
            assert twin.masks is not host.masks and twin.optimizer is not host.optimizer
        if step >= 9:
            backward(other, step)
            twin.step()
            check(twin, other)
        backward(model, step)
        host.step()
    assert_same(model, other, 0)
    assert all(torch.equal(mask, twin.masks[name]) for name, mask in host.masks.items())


@pytest.mark.parametrize("missing", ["put_off", "drawn", "decay", "momentum", "generator", "fired_masks", "death_rate"])
def test_older_states_without_newer_keys_are_taken(missing):
    model = built()
    host = host_of(model)
    for step in range(9):
        backward(model, step)
        host.step()
    state = copy.deepcopy(host.state_dict())
    del state[missing]
    other = host_of(built())
    other.load_state_dict({**state, "of_a_later_version": 1})
    assert other.steps == 9 and all(torch.equal(mask, host.masks[name]) for name, mask in other.masks.items())


@pytest.mark.parametrize("state", [{}, {"masks": {}}, {"steps": 3}])
def test_what_is_no_state_of_a_host_is_refused(state):
    with pytest.raises(UsageError, match="no host's state"):
        host_of(built()).load_state_dict(state)


def test_numbers_may_be_text_as_yaml_makes_them():
    model = built()
    host = host_of(model, density="2e-1", update_frequency="7")
    texts = Masking(torch.optim.SGD(built().parameters(), 0.1), death_rate="4e-1")
    assert host.nonzeros == round(0.2 * host.theoretical_size) and host.prune_every_k_steps == 7
    assert texts.death_rate == 0.4


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"density": "dense"}, "density must be a number"),
        ({"update_frequency": "7.5"}, "update_frequency must be a whole number"),
        ({"update_frequency": "often"}, "update_frequency must be a number"),
    ],
)
def test_text_that_is_no_number_is_refused(kwargs, words):
    with pytest.raises(UsageError, match=words):
        host_of(built(), **kwargs)


# ---------------------------------------------------------------------- starts and names of ITOP


@pytest.mark.parametrize("name", ["lottery_ticket", "magnitude"])
def test_the_largest_weights_over_all_layers_are_a_start(name):
    model = built()
    before = copy.deepcopy(model.state_dict())
    host = host_of(model, add={"sparse_init": name})
    check(host, model, round(0.2 * host.theoretical_size))
    sizes = torch.cat([before[name].abs().flatten() for name in host.masks])
    kept = torch.cat([mask.flatten() for mask in host.masks.values()])
    assert sizes[kept].min() >= sizes[~kept].max()
    assert all(torch.equal(host.weights[n][m], before[n][m]) for n, m in host.masks.items())
    counts = dict(host.name2nonzeros)
    for step in range(STEPS):
        backward(model, step)
        host.step()
    assert host.name2nonzeros == counts


def pruned_checkpoint():
    """What torch.nn.utils.prune leaves when it is removed."""
    model = built()
    layers = [(layer, "weight") for layer in (model.conv1, model.conv2, model.fc)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.8)
    for layer, name in layers:
        prune.remove(layer, name)
    return model


def test_a_pruned_checkpoint_is_a_start():
    model = pruned_checkpoint()
    before = copy.deepcopy(model.state_dict())
    host = host_of(model, add={"sparse_init": "resume"})
    assert all(torch.equal(mask, before[name] != 0) for name, mask in host.masks.items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for step in range(STEPS):
        backward(model, step)
        host.step()
        check(host, model, round(0.2 * host.theoretical_size))


def test_a_checkpoint_of_another_density_is_refused_with_its_own():
    with pytest.raises(UsageError, match=r"nonzero.*give density=0\.2") as error:
        host_of(pruned_checkpoint(), density=0.1, add={"sparse_init": "resume"})
    given = float(str(error.value).split("density=")[1])
    host_of(pruned_checkpoint(), density=given, add={"sparse_init": "resume"})


def test_names_of_itop_that_prune_epoch_by_epoch_say_what_to_use():
    with pytest.raises(UsageError, match="schedule=Gradual"):
        host_of(built(), add={"sparse_init": "GMP"})
    model = built()
    host = host_of(model, schedule=Gradual(0.2, initial=1.0, stop=9, frequency=3, end=20))
    with pytest.raises(UsageError, match="schedule=Gradual"):
        host.truncate_weights_GMP(1)
    for step in range(10):
        backward(model, step)
        host.step()
    check(host, model, round(0.2 * host.theoretical_size))


def test_itop_names_for_updates_and_removal():
    model = built()
    host = host_of(model, update_frequency=None, growth_mode="random")
    first = clones(host.masks)
    backward(model, 0)
    host.step()
    host.at_end_of_epoch()
    assert any(not torch.equal(first[name], mask) for name, mask in host.masks.items())
    host.remove_param_names(["fc.weight", "conv1"])
    assert list(host.masks) == ["conv2.weight"]
