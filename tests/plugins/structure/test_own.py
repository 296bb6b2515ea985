"""A structure of one's own: in Python, in a registry, by `module:name` on the command line."""

import sys

import pytest
import torch
from torch import nn

from east_plugins import Masking, UsageError, structure
from east_plugins.options import flags, sources

COLUMNS = """
from dataclasses import dataclass

import torch
from east_plugins import option


@dataclass(frozen=True)
class Columns:
    "Whole columns, those of the largest growth scores."

    most: int = option(3, "columns of a layer", type=int)

    def start(self, shape, budget, generator):
        mask = torch.zeros(tuple(shape), dtype=torch.bool)
        mask[:, : self.most] = True
        return mask

    def update(self, layers, moment):
        best = [each.growth.abs().sum(0).topk(self.most).indices for each in layers]
        masks = [torch.zeros_like(each.layer.mask) for each in layers]
        for mask, columns in zip(masks, best):
            mask[:, columns] = True
        return masks
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(COLUMNS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return __import__("mine")


def test_the_host_holds_what_it_chooses(mine):
    model = nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    host = Masking(optimizer, growth_mode="gradient", structure=mine.Columns(2), update_frequency=1)
    host.add_module(model, density=0.5)
    assert host.nonzeros == 18 and host.masks["0.weight"][:, :2].all()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 9)).square().sum().backward()
        wanted = {name: weight.grad.abs().sum(0).topk(2).indices.sort().values for name, weight in host.weights.items()}
        host.step()
        for name, mask in host.masks.items():
            assert torch.equal(mask.all(0).nonzero().flatten(), wanted[name]) and host.name2nonzeros[name] == 2 * len(
                mask
            )
            assert not host.weights[name][~mask].any()


def test_its_name_and_options_are_flags(mine):
    parser = flags.Parser(late=sources.late)
    sources.add_flags(parser)
    line = "--method rigl --structure mine:Columns --structure-most 4"
    resolved = sources.from_flags(vars(parser.parse_args(line.split()))).resolve(10)
    assert resolved.structure == "mine:Columns" and resolved.plugin_options["structure_most"] == 4
    model = nn.Sequential(nn.Linear(9, 4))
    host = Masking.of(
        "rigl", model, torch.optim.SGD(model.parameters(), 0.1), density=0.9, steps=10, structure="mine:Columns"
    )
    assert host.nonzeros == 12
    with pytest.raises(UsageError, match="`structure_least` is no option of `structure` mine:Columns"):
        sources.from_flags({"method": "rigl", "structure": "mine:Columns", "structure_least": 1}).resolve(10)


def test_a_registered_one_goes_by_its_name(mine, monkeypatch):
    monkeypatch.setattr(structure, "_entries", dict(structure._entries))
    structure.register("whole-columns")(mine.Columns)
    model = nn.Sequential(nn.Linear(9, 4))
    host = Masking(
        torch.optim.SGD(model.parameters(), 0.1), structure="whole-columns", options={"structure": {"most": 1}}
    )
    host.add_module(model, density=0.5)
    assert host.nonzeros == 4
