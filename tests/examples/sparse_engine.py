"""A method by name in a loop of one's own, computed with active weights only."""

import torch
from torch.nn.functional import cross_entropy

from east_plugins import Engine, Masking
from east_plugins.training.models import build

STEPS, SHAPE = 20, (3, 16, 16)

model = build("resnet20", num_classes=10, image_size=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
mask = Masking.of("rigl+connected", model, optimizer, density=0.005, steps=STEPS, input_shape=SHAPE, update_frequency=5)
engine = Engine(mask, SHAPE, engine="sparse")  # "auto", the default, measures whether that is faster than dense

for _ in range(STEPS):
    optimizer.zero_grad()
    loss = cross_entropy(model(torch.randn(16, *SHAPE)), torch.randint(10, (16,)))
    loss.backward()
    mask.step()
print(f"{mask.nonzeros} active weights, the engine is {'dense: ' + engine.reason if engine.dense else 'sparse'}")
