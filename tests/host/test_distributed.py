"""Two processes: masks are drawn and updated alike on every rank, growth uses |mean g|."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from east_plugins import Masking


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
