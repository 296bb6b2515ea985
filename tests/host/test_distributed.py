"""Several processes: masks are drawn and updated alike on every rank, growth uses |mean g|."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from east_plugins import Masking
from east_plugins.errors import RanksError, UsageError
from east_plugins.plugins import registry

RULES = sorted(registry.growth.names())


def _work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(100 + rank)  # the published hosts draw masks per rank and never broadcast them
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    wrapped = nn.parallel.DistributedDataParallel(model)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), growth_mode="gradient", update_frequency=2)
    host.add_module(wrapped, density=0.2)
    drawn = {name: mask.clone() for name, mask in host.masks.items()}
    for _ in range(6):
        host.optimizer.zero_grad()
        wrapped(torch.randn(8, 12)).square().mean().backward()
        host.step()
    torch.save({"drawn": drawn, "masks": host.masks, "weights": model.state_dict()}, f"{folder}/{rank}.pt")

    # no DDP: gradients of opposite signs on the two ranks cancel in the mean, and are the largest in size
    torch.manual_seed(0)
    alone = nn.Linear(10, 1, bias=False)
    host = Masking(torch.optim.SGD(alone.parameters(), 0.1), death_rate=0.5, growth_mode="gradient", seed=rank)
    host.add_module(alone, density=0.2)
    inactive = (~host.masks["weight"]).flatten().nonzero().flatten()
    gradient = torch.zeros(10)
    gradient[inactive] = 1.0
    gradient[inactive[0]] = 100.0 if rank else -100.0
    alone.weight.grad = gradient[None]
    host.truncate_weights()
    torch.save((inactive[0], host.masks["weight"]), f"{folder}/growth{rank}.pt")
    dist.destroy_process_group()


def test_masks_agree_between_ranks(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for what in first:
        for name in first[what]:
            assert torch.equal(first[what][name], second[what][name]), (what, name)
    assert any(not torch.equal(first["drawn"][name], first["masks"][name]) for name in first["masks"])
    cancelled, mask = torch.load(tmp_path / "growth0.pt")
    assert not mask.flatten()[cancelled], "growth must use |mean g|, not the mean of |g|"
    assert torch.equal(mask, torch.load(tmp_path / "growth1.pt")[1])


def run(rule, model, call, batches, **options):
    """20 updates by a rule; `batches` are inputs and targets of this process."""
    host = Masking(
        torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), growth_mode=rule, update_frequency=1, seed=3, **options
    )
    host.add_module(model, density=0.3)
    for x, y in batches:
        host.optimizer.zero_grad()
        (call(x) - y).square().mean().backward()
        host.step()
    return {name: mask.clone() for name, mask in host.masks.items()}, model.state_dict()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def batches(world, rank):
    """This rank's part of 20 global batches of 24."""
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(24, 16, generator=generator, dtype=torch.float64) for _ in range(20)]
    return [(each[rank::world, :12], each[rank::world, 12:]) for each in draw]


def _every_rule(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for rule in RULES:
        model = network()
        found[rule] = run(rule, model, nn.parallel.DistributedDataParallel(model), batches(world, rank))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_growth_rule_is_that_of_one_process_with_the_whole_batch(world, tmp_path):
    mp.spawn(_every_rule, (world, str(tmp_path)), nprocs=world)
    for rule in RULES:
        model = network()
        masks, weights = run(rule, model, model, batches(1, 0))
        for rank in range(world):
            there, values = torch.load(tmp_path / f"{rank}.pt")[rule]
            assert all(torch.equal(mask, there[name]) for name, mask in masks.items()), (rule, rank)
            for name, value in weights.items():
                torch.testing.assert_close(values[name], value, atol=1e-12, rtol=0, msg=f"{rule} {rank} {name}")


def _too_early(rank, folder):
    model = network()
    host = Masking(torch.optim.SGD(model.parameters(), 0.05), growth_mode="gradient", seed=rank)
    host.add_module(model, density=0.3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    nn.parallel.DistributedDataParallel(model)(torch.randn(8, 12).double()).square().mean().backward()
    with pytest.raises(RanksError, match="masks of 0.weight differ .*after torch.distributed.init_process_group"):
        host.step()
    dist.destroy_process_group()


def test_a_host_from_before_the_processes_met_is_one_line(tmp_path):
    mp.spawn(_too_early, (str(tmp_path),), nprocs=2)


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from east_plugins import Masking

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Linear(64, 8)
host = Masking(torch.optim.SGD(model.parameters(), 0.01), growth_mode="gradient", update_frequency=1)
host.add_module(model, density=0.2)  # no DDP: what meets is the host alone
while True:
    host.optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    host.step()
    open(f"{sys.argv[1]}.{rank}", "a").write(".")
"""


def test_a_rank_that_is_killed_ends_the_others_with_a_line(tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(words, env={**os.environ, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ends = time.monotonic() + 60
    while not all((tmp_path / f"meet.{rank}").exists() for rank in range(2)):
        assert time.monotonic() < ends
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGKILL)
    error = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 1 and "another process of this run is gone" in error.splitlines()[-1]


def test_weights_in_parts_are_refused():
    """FSDP2's, and those of tensor parallelism."""
    model = network()
    model[0].weight.device_mesh = "a mesh"
    with pytest.raises(UsageError, match="layer 0 holds a part of its weight only"):
        Masking(torch.optim.SGD(model.parameters(), 0.1)).add_module(model, density=0.3)
