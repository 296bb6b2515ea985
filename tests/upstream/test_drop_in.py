"""The drop-in promise: a script with ITOP's calls, on networks and in loops that do more than ITOP's own, has ITOP's
density with our host lent as `sparselearning`, or ends with one line."""

import re
from pathlib import Path

import pytest

from east_plugins import __main__ as command_line

DENSITY = 0.1

pytestmark = pytest.mark.usefixtures("elsewhere")

SCRIPT = """
import argparse
import torch
import torch.nn.functional as F
from torch import nn
import sparselearning.core
from sparselearning.core import CosineDecay, Masking

parser = argparse.ArgumentParser()
sparselearning.core.add_sparse_args(parser)
args = parser.parse_args(["--sparse", "--update_frequency", "4", "--density", "{density}"])
torch.manual_seed(1)


def block():
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return F.relu_(out)


def network(middle):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def train(model, optimizer, before=lambda mask: None, step=lambda mask: mask.step()):
    mask = Masking(optimizer, death_rate=0.5, death_mode="magnitude", death_rate_decay=CosineDecay(0.5, 24),
                   growth_mode="gradient", redistribution_mode="none", args=args)
    mask.add_module(model, density=args.density, sparse_init="ERK")
    before(mask)
    x = torch.randn(26, 4, 3, 8, 8)
    for batch in x:
        mask.optimizer.zero_grad()
        F.cross_entropy(model(batch), torch.arange(4)).backward()
        step(mask)
    return model


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


print("host", Masking.__module__)
{kind}
weights = {{id(w): w for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for w in [m.weight]}}.values()
print("density", sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights))
"""

KINDS = {
    "in place after a norm": "model = network([InPlace(), InPlace()]); train(model, sgd(model))",
    "in-place functions": (
        "model = network([block(), nn.Conv2d(8, 8, 1), nn.Hardswish(inplace=True)]); train(model, sgd(model))"
    ),
    "one block three times": "one = block(); model = network([one, one, one]); train(model, sgd(model))",
    "one ReLU in two places": (
        "relu = nn.ReLU(); model = network([nn.Conv2d(8, 8, 1), relu, nn.Conv2d(8, 8, 1), relu])\n"
        "train(model, sgd(model))"
    ),
    "dense weights loaded after add_module": (
        "dense = network([block()]).state_dict(); model = network([block()])\n"
        "train(model, sgd(model), before=lambda mask: model.load_state_dict(dense))"
    ),
    "weights copied in between": (
        "dense = network([block()]); model = network([block()])\n"
        "def step(mask):\n"
        "    mask.step()\n"
        "    if mask.steps == 22:\n"
        "        with torch.no_grad():\n"
        "            for ours, theirs in zip(model.parameters(), dense.parameters()): ours.copy_(theirs)\n"
        "train(model, sgd(model), step=step)"
    ),
    "the optimizer is stepped as well": (
        "model = network([block()])\ntrain(model, sgd(model), step=lambda mask: (mask.optimizer.step(), mask.step()))"
    ),
    "another optimizer in its place": (
        "model = network([block()])\n"
        "train(model, sgd(model), before=lambda mask: setattr(mask, 'optimizer', sgd(model)))"
    ),
    "a frozen stem": (
        "model = network([block()]); model[0].weight.requires_grad_(False); train(model, sgd(model))\n"
        "model[0] = nn.Identity()"
    ),
    "spectral norm": (
        "model = network([nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))]); train(model, sgd(model))"
    ),
    "weight norm": (
        "model = network([nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))]); train(model, sgd(model))"
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("kind", KINDS)
def test_a_script_of_another_kind_has_itops_density_or_ends_with_a_line(capsys, kind):
    Path("s.py").write_text(SCRIPT.format(density=DENSITY, kind=KINDS[kind]))
    code = command_line.main(["run", "s.py"])
    out, said = capsys.readouterr()
    if code == 2:
        assert len([line for line in said.splitlines() if "lending" not in line]) == 1 and "density" not in out
    else:
        assert code == 0 and "host east_plugins." in out
        # the drift of ITOP's own host on such networks
        assert float(re.search(r"density (\S+)", out)[1]) == pytest.approx(DENSITY, rel=0.05)
