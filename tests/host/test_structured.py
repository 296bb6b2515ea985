"""Methods of other papers in a host: under every trick, resumed, exported, in other people's networks."""

import copy

import pytest
import torch
import torchvision
from torch.nn import functional as F

from east_plugins import Masking, export, train
from east_plugins.__main__ import main
from east_plugins.options.config import Config
from east_plugins.plugins.structure.diagonals import diagonals
from east_plugins.training import models

SHAPE = (1, 8, 8)
METHODS = ["srigl", "chase", "cht", "neurrev", "dynadiag"]


def batches(count, shape=SHAPE, first=0):
    for step in range(first, first + count):
        draw = torch.Generator().manual_seed(step)
        yield torch.randn(8, *shape, generator=draw), torch.randint(10, (8,), generator=draw)


def steps(model, host, count, shape=SHAPE, first=0):
    for x, y in batches(count, shape, first):
        host.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        host.step()
        yield host


def keeps_its_structure(method, masks):
    for mask in masks.values():
        if method.startswith("srigl"):
            counts = mask.flatten(1).sum(1)
            assert len(counts[counts > 0].unique()) == 1
        if method.startswith("dynadiag"):
            places = diagonals(mask.shape)
            assert int(mask.flatten()[places].all(1).sum()) * places.shape[1] == int(mask.sum())
    return True


def host_of(method, density=0.1, model=None, **settings):
    torch.manual_seed(0)
    model = model or models.build("resnet20", 10, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    settings = {"steps": 60, "update_frequency": 2, "input_shape": SHAPE, **settings}
    return model, Masking.of(method, model, optimizer, density=density, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_updates_under_cycles_sharing_and_dyrelu(method):
    settings = {"east_cyclic_multiplier": 3, "east_cyclic_length": 0.3, "east_cyclic_update_frequency": 3}
    model, host = host_of(f"{method}+cyclic+share+dyrelu", **settings)
    updates, moved, masks, peak = 0, 0, copy.deepcopy(dict(host.masks)), host.nonzeros
    for _ in steps(model, host, 60):
        asked = host.target_nonzeros(host.steps)
        if host.schedule.due(host.steps):
            updates, moved = updates + 1, moved + any(not torch.equal(masks[n], mask) for n, mask in host.masks.items())
            assert host.nonzeros == asked or (host.structure is not None and 0.9 * asked < host.nonzeros < asked)
        assert host.nonzeros == sum(int(mask.sum()) for mask in host.masks.values())
        assert not any(host.weights[name][~mask].any() for name, mask in host.masks.items())
        assert keeps_its_structure(method, host.masks)
        masks, peak = copy.deepcopy(dict(host.masks)), max(peak, host.nonzeros)
    assert updates >= 20 and moved >= 15 and peak > 2.5 * host.nonzeros and host.is_at(60)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_as_the_undisturbed_one(method):
    straight, host = host_of(method)
    list(steps(straight, host, 8))
    saved = copy.deepcopy([straight.state_dict(), host.optimizer.state_dict(), host.state_dict()])
    list(steps(straight, host, 8, first=8))
    model, resumed = host_of(method)
    for part, state in zip((model, resumed.optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)
    list(steps(model, resumed, 8, first=8))
    for name, mask in host.masks.items():
        assert torch.equal(mask, resumed.masks[name]) and torch.equal(host.weights[name], resumed.weights[name])


@pytest.mark.parametrize("method", ["srigl", "dynadiag"])
def test_the_structure_reaches_the_exported_file(method, tmp_path):
    config = Config(
        method=method, model="cnn", width=8, data="digits", limit=128, epochs=2, batch_size=32, density=0.1, threads=1,
        update_frequency=1, device="cpu",
    )  # fmt: skip
    summary = train(config, tmp_path / "run", quiet=True)
    assert main(f"export {tmp_path}/run --format safetensors --out {tmp_path}/net.safetensors".split()) == 0
    model = models.build("cnn", 10, 1, 16, 8)
    _, masks = export.load_sparse(tmp_path / "net.safetensors", model)
    assert sum(int(mask.sum()) for mask in masks.values()) == summary["nonzeros"] and keeps_its_structure(method, masks)


@pytest.mark.parametrize("method", METHODS)
def test_a_torchvision_network_in_a_loop_of_its_own(method):
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25)
    model, host = host_of(method, 0.2, model, steps=6, update_frequency=2, input_shape=(3, 32, 32))
    for _ in steps(model, host, 6, (3, 32, 32)):
        assert keeps_its_structure(method, host.masks)
    assert host.is_at(6)
