"""EAST's three tricks in a training loop of one's own: weight sharing, phased DyReLU, cyclic sparsity."""

import torch
from torch.nn.functional import cross_entropy

from east_plugins import Cyclic, Masking, PhaseOut, attach, factory, share
from east_plugins.training.models import build

STEPS, SHAPE = 40, (3, 8, 8)

model = build("resnet20", num_classes=10, image_size=8, width=8)
share(model)  # before the optimizer is made: the blocks of a stage have one weight from now on
phased = attach(model, factory("dyrelu-b"), SHAPE, phase_out=PhaseOut(start=10, end=20))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = Cyclic(0.05, multiplier=4, cycles=2, length=12, cyclic_frequency=3, frequency=5, end=STEPS)
mask = Masking(optimizer, death_rate=0.5, growth_mode="gradient", schedule=schedule, plugins=[phased])
mask.add_module(model, density=0.05)

for step in range(1, STEPS + 1):
    optimizer.zero_grad()
    cross_entropy(model(torch.randn(8, *SHAPE)), torch.randint(10, (8,))).backward()
    mask.step()
    if step % 6 == 0 or step == STEPS:
        print(f"step {step}: {mask.nonzeros} active weights, {len(list(model.parameters()))} parameters")
