"""A loop with Accelerate and a sparse network."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from east_plugins import Masking
from east_plugins.trainers import save_with_optimizer
from east_plugins.training.models import build

accelerator = Accelerator(cpu=True)
model = build("resnet20", num_classes=10, image_size=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
mask = Masking.of("rigl+connected", model, optimizer, density=0.01, steps=8, input_shape=(3, 16, 16))
save_with_optimizer(mask)  # before anything is prepared or loaded
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(8):
    loss = cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.randint(10, (8,)))
    accelerator.backward(loss)
    optimizer.step()  # the host follows
    optimizer.zero_grad()
accelerator.save_state("state")  # the host's state is in it
print(f"{mask.steps} steps, {mask.nonzeros} active weights")
