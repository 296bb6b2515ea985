"""Cycles and phased DyReLU on a `Masking` of somebody else's, here a small one in ITOP's manner."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from east_plugins import EastOptions
from east_plugins.upstream import attach

sys.path.insert(0, str(Path(__file__).parents[1] / "upstream" / "script"))
from sparselearning.core import CosineDecay, Masking  # not ours: the checkout's own

EPOCHS, STEPS = 4, 10
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
args = SimpleNamespace(fix=False, update_frequency=5)
mask = Masking(optimizer, 0.5, death_rate_decay=CosineDecay(0.5, EPOCHS * STEPS), growth_mode="gradient", args=args)
attachment = attach(
    mask, EastOptions(cyclic=True, cyclic_multiplier=3, dyrelu=True), epochs=EPOCHS, steps_per_epoch=STEPS,
    input_shape=(3, 6, 6), first_drop=3,
)  # fmt: skip
mask.add_module(model, density=0.08)  # as the script does it

for _ in range(EPOCHS * STEPS):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(8, 3, 6, 6)), torch.randint(4, (8,))).backward()
    mask.step()
kind, active = attachment.adapter.title, attachment.adapter.nonzeros
print(f"{kind}: {active} active weights, finished: {attachment.finished}")
print("activations:", ", ".join(type(module).__name__ for module in model if not list(module.parameters())))
