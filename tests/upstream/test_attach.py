"""`attach`: EAST on a host from a person's own code, and its state, alike for every kind of host."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError
from east_plugins.options.east import EastOptions
from east_plugins.upstream import attach

SCRIPT = Path(__file__).parent / "script"
HOSTS = ["itop", "sparse_learning", "granet", "rigl", "own"]
EPOCHS, STEPS = 4, 10
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
DENSITY = 0.08


@pytest.fixture
def build(elsewhere, monkeypatch):
    """`build(kind)`: model, optimizer and host; the host has its masks."""
    monkeypatch.syspath_prepend(str(SCRIPT))

    def build(kind, masks=True):
        import others
        from sparselearning.core import CosineDecay
        from sparselearning.core import Masking as ITOP

        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        total = EPOCHS * STEPS
        args = SimpleNamespace(fix=False, update_frequency=5, init_density=DENSITY, method="DST")
        given = dict(density=DENSITY)
        if kind == "itop":
            host = ITOP(
                optimizer,
                death_rate=0.5,
                death_rate_decay=CosineDecay(0.5, total),
                growth_mode="gradient",
                redistribution_mode="none",
                args=args,
            )
        elif kind == "sparse_learning":
            host = others.sparse_learning()(optimizer, others.Decay(0.5, total), 0.5)
        elif kind == "granet":
            args.final_density, given = DENSITY, {}
            host = others.granet()(optimizer, prune_rate=0.5, prune_rate_decay=CosineDecay(0.5, total), args=args)
        elif kind == "rigl":
            return model, optimizer, others.RigLScheduler(model, optimizer, DENSITY, T_end=total, delta=5)
        else:
            host = Masking(
                optimizer, death_rate_decay=CosineDecay(0.5, total), growth_mode="gradient", update_frequency=5
            )
        if masks:
            host.add_module(model, **given)
        return model, optimizer, host

    return build


def train(model, optimizer, host, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3, 6, 6, generator=generator)).square().mean().backward()
        if not hasattr(host, "W"):
            host.step()
        elif host():
            optimizer.step()


def attached(host, **options):
    return attach(host, EastOptions(**options), epochs=EPOCHS, steps_per_epoch=STEPS, input_shape=(3, 6, 6))


@pytest.mark.parametrize("kind", HOSTS)
def test_all_but_sharing_on_a_host_that_has_its_masks(build, kind):
    model, optimizer, host = build(kind)
    attachment = attached(host, cyclic=True, dyrelu=True, dyrelu_end=2)
    target = attachment.adapter.nonzeros if kind == "rigl" else round(DENSITY * (3 * 72 + 8 * 72 + 32 * 4))
    train(model, optimizer, host, 4)
    assert attachment.adapter.nonzeros == min(10 * target, 920) and not attachment.finished
    train(model, optimizer, host, EPOCHS * STEPS - 4)
    assert attachment.adapter.nonzeros == target and attachment.finished and attachment.steps == EPOCHS * STEPS
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU] * 2 + [nn.Flatten, nn.Linear]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


@pytest.mark.parametrize("kind", HOSTS)
def test_state_is_read_and_restored_alike(build, kind, tmp_path):
    first = build(kind)
    attachment = attached(first[2], cyclic=True)
    train(*first, 13)
    torch.save(attachment.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert {"masks", "fired_masks", "steps", "generator"} <= state.keys() and state["steps"] == 13
    assert set(state["masks"]) == {"0.weight", "2.weight", "5.weight"}
    for name, mask in state["masks"].items():
        assert mask.dtype == torch.bool and not (mask & ~state["fired_masks"][name]).any()
        assert not first[0].state_dict()[name][~mask].any()
    model, optimizer, host = build(kind)
    other = attached(host, cyclic=True)
    other.load_state_dict(state)
    model.load_state_dict(first[0].state_dict())
    assert other.steps == 13 and other.adapter.nonzeros == attachment.adapter.nonzeros
    for name, mask in other.adapter.masks.items():
        assert torch.equal(mask, state["masks"][name])
    train(model, optimizer, host, EPOCHS * STEPS - 13)
    assert other.finished
    assert all(torch.equal(fired | other.state_dict()["fired_masks"][name], other.state_dict()["fired_masks"][name])
               for name, fired in state["fired_masks"].items())  # fmt: skip


def test_state_of_another_network_is_refused(build):
    attachment = attached(build("itop")[2], cyclic=True)
    state = attachment.state_dict()
    state["masks"]["0.weight"] = state["masks"]["0.weight"][:4]
    with pytest.raises(UsageError, match=r"do not fit the model; layers that differ: 0\.weight"):
        attachment.load_state_dict(state)


@pytest.mark.parametrize("kind", HOSTS)
def test_sharing_is_refused_once_masks_are_made(build, kind):
    with pytest.raises(UsageError, match="attach to the host before add_module"):
        attached(build(kind)[2], share=True)


def test_a_host_of_an_unknown_version_is_refused_untouched():
    class Masking:
        def __init__(self, optimizer, sparsity):
            self.modules = []

    host = Masking(None, 0.9)
    with pytest.raises(UsageError, match=r"Masking\(optimizer, sparsity\) is a host of an unknown version; known are"):
        attached(host, cyclic=True)
    assert type(host) is Masking


def test_a_host_without_masks_starts_when_it_makes_them(build):
    model, optimizer, host = build("itop", masks=False)
    attachment = attached(host, dyrelu=True, dyrelu_end=2)
    assert not attachment.started
    host.add_module(model, density=DENSITY)
    assert attachment.started and attachment.phased is not None
    assert set(attachment.adapter.masks) == {"0.weight", "2.weight", "5.weight"}  # none for the activations


def test_cycles_are_refused_where_a_schedule_of_the_hosts_own_sets_the_density(build):
    _, _, host = build("granet")
    host.args.method = "GraNet"
    with pytest.raises(UsageError, match="--method DST"):
        attached(host, cyclic=True)
