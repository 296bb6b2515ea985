"""Where there is no GPU: a step on tensors that only claim to be on one. What would read them on the host raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from east_plugins import Masking
from east_plugins.plugins.activation import factory
from east_plugins.plugins.activation.phased import PhaseOut, attach
from east_plugins.training import models

OPTIMIZERS = {  # a fused one has no fake: it would be run
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=True, capturable=True),
}


class Calls(TorchDispatchMode):
    """Operations that ran, by name, and those that moved something between devices."""

    def __init__(self):
        super().__init__()
        self.names, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":  # questions about tensors, notes for profilers
            return result
        self.names.append(func.name())
        devices = {leaf.device.type for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result))
                   if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}  # fmt: skip
        if len(devices) > 1:
            self.copies.append(func.name())
        return result


def on_fake_cuda(host, mode):
    """Parameters, gradients and masks of a host claim to be on a GPU."""

    def fake(tensor):
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cuda:0"))

    fakes = {p: torch.nn.Parameter(fake(p.detach())) for p in host.modules[0].parameters()}
    for module in host.modules[0].modules():
        module._parameters.update({name: fakes[p] for name, p in module._parameters.items() if p is not None})
    for parameter in fakes.values():
        parameter.grad = fake(parameter.detach())
    for group in host.optimizer.param_groups:
        group["params"] = [fakes[p] for p in group["params"]]
    host.weights.update({name: fakes[p] for name, p in host.weights.items()})
    counts = dict(host.name2nonzeros)
    for table in (host.masks, host.fired_masks):
        table.update({name: fake(mask) for name, mask in table.items()})
    host.name2nonzeros.update(counts)  # nobody can count what only claims to be there


def calls_of_a_step(model, optimizer, plugins=(), density=0.02, **kwargs):
    host = Masking(OPTIMIZERS[optimizer](model.parameters()), update_frequency=None, seed=0, plugins=plugins, **kwargs)
    host.add_module(model, density=density)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_cuda(host, mode)
        host.step()  # gives the optimizer its state
        with Calls() as calls:
            host.step()
    return calls


def network(name="resnet18"):
    torch.manual_seed(0)
    return models.build(name, 10, width=8)


@pytest.mark.parametrize("read", [lambda t: t.sum().item(), lambda t: bool((t > 0).any()), lambda t: t.tolist()])
def test_the_check_sees_a_synchronisation(read):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        read(torch.empty(3, 3, device="cuda"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.002, 0.3])
@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
def test_step_waits_for_nothing_between_updates(growth, density, optimizer):
    calls = calls_of_a_step(network(), optimizer, density=density, growth_mode=growth)
    assert calls.names and not calls.copies


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_a_step_takes_as_many_operations_for_few_layers_as_for_many(growth):
    few, many = (calls_of_a_step(network(name), "sgd", growth_mode=growth) for name in ("resnet18", "resnet50"))
    assert sorted(few.names) == sorted(many.names)


@pytest.mark.parametrize("beta", ["full", "blend"])
def test_step_waits_for_nothing_while_an_activation_is_phased_out(beta):
    model = network()
    phased = attach(model, factory("dyrelu-b"), (3, 16, 16), phase_out=PhaseOut({"full": 9, "blend": 0}[beta], 10))
    calls = calls_of_a_step(model, "sgd", plugins=[phased])
    assert phased.sites and calls.names and not calls.copies
